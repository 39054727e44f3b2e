"""Every example of the README's command-line section, run, and its output compared."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import SUBCOMMANDS, Program, Result
from tests.unit.optional import missing_for_qwen3_5

ROOT = Path(__file__).parents[3]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## The command line\n")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```console\n(.*?)```", SECTION, flags=re.DOTALL)

# The published numbers of Qwen/Qwen3.5-35B-A3B, and a model without attention.
QWEN: dict[str, Any] = {
    "model_type": "qwen3_5_moe",
    "text_config": {
        "model_type": "qwen3_5_moe_text",
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_hidden_layers": 40,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
}
FILES = {
    "Qwen3.5-35B-A3B/config.json": QWEN,
    "falcon-mamba-7b/config.json": {"model_type": "falcon_mamba", "num_hidden_layers": 64},
}


def test_the_section_has_an_example_of_every_subcommand() -> None:
    words = set(re.findall(r"^\$ tp-validate (\w+)", "\n".join(BLOCKS), flags=re.MULTILINE))
    # The table is a picture, and completion a script.
    assert words | {"table", "completion"} == set(SUBCOMMANDS)
    assert "tp-validate table" in SECTION
    assert (ROOT / "scripts" / "matrix.svg").stat().st_size > 10_000


def in_a_process(arguments: list[str]) -> Result:
    command = [sys.executable, "-m", "torchtitan_tp_validate", *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    return Result(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_the_output_is_what_the_readme_shows(
    block: int, tp_validate: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_0_3 = "--config " in BLOCKS[block] or "qwen3_5" in BLOCKS[block].split("Qwen3.5")[0]
    if (needs_0_3 or "doctor" in BLOCKS[block]) and not version("torchtitan").startswith("0.3"):
        pytest.skip("the README shows torchtitan 0.3")
    if needs_0_3 and missing_for_qwen3_5:
        pytest.skip("the README shows torchtitan's qwen3_5")
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    status = 0
    for example in BLOCKS[block].split("\n$ "):
        command, _, shown = example.removeprefix("$ ").partition("\n")
        if command == "echo $?":
            assert shown.strip() == str(status)
            continue
        arguments = shlex.split(command)[1:]
        # What the doctor sees depends on what its process has loaded.
        status, out, err = in_a_process(arguments) if arguments == ["doctor"] else tp_validate(*arguments)
        # Warnings of other packages come first on standard error.
        real = out or err[err.find("tp-validate: ") :]
        pattern = re.escape(f"{shown.rstrip()}\n").replace(re.escape("[...]"), ".*")
        assert re.fullmatch(pattern, real, flags=re.DOTALL), f"shown:\n{shown}\nreal:\n{real}"
