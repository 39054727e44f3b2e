"""``rules``, ``rule``, ``doctor``, ``completion``, and the hooks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.unit.cli.conftest import SUBCOMMANDS, Program
from torchtitan_tp_validate.cli.rules import IGNORED
from torchtitan_tp_validate.install import installed
from torchtitan_tp_validate.rules import RULES

ROOT = Path(__file__).parents[3]


def test_every_rule_is_listed_and_explained(tp_validate: Program) -> None:
    status, out, _ = tp_validate("rules")
    assert (status, [line.split()[0] for line in out.splitlines()]) == (0, list(RULES))
    for code, rule in RULES.items():
        status, out, _ = tp_validate("rule", code.lower())
        assert status == 0
        assert out.startswith(f"{code}: {rule.dim}\n")
        assert rule.why in out
        assert out.endswith(f"\nSource: {rule.source}\n")
        assert all(consequence in out for consequence in IGNORED[code])


def test_a_rule_in_full(tp_validate: Program) -> None:
    assert tp_validate("rule", "TP002").out == (
        "TP002: n_kv_heads\n\n"
        "The tensor parallel degree must fit n_kv_heads: wk and wv are split by columns, so that every rank "
        "computes whole key-value heads.\n\n"
        "When it does not, and nobody checks:\n"
        "  torchtitan 0.2.x:         dies in forward\n"
        "  0.3.x, spmd_types:        first layer refused late, later ones die\n"
        "  0.3.x, DTensor backends:  the same\n\n"
        "Source: torchtitan models/*/parallelize.py; https://github.com/pytorch/torchtitan/issues/2574\n"
    )


def test_what_happens_is_what_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z]+\d+) \|[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|$", readme, flags=re.MULTILINE)
    shown = {code: tuple(cell.strip().replace("*", "") for cell in cells) for code, *cells in rows}
    assert shown == IGNORED


def test_the_doctor_says_what_is_found_and_guarded(tp_validate: Program) -> None:
    status, out, _ = tp_validate("doctor")
    assert status == 0
    assert f"torchtitan {version('torchtitan')}\n" in out
    assert f"torch {version('torch')}\n" in out
    assert re.search(r"^guarded +llama3: torchtitan\.models\.llama3\..*parallelize_llama: guarded", out, re.M)
    assert re.search(r"^not guarded +\w+: \w+: torchtitan .* has no such model$", out, re.M)
    assert not installed().active


def test_a_completion_script_completes(tp_validate: Program, tmp_path: Path) -> None:
    status, script, _ = tp_validate("completion", "bash")
    assert status == 0
    assert "doctor" in script
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    file = tmp_path / "completion.sh"
    file.write_text(script)
    function = re.search(r"complete .*-F (\w+) tp-validate", script)
    assert function is not None
    ask = f"source {file}; COMP_WORDS=(tp-validate doc); COMP_CWORD=1; {function[1]}; echo ${{COMPREPLY[@]}}"
    answer = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=60)
    assert answer.stdout.split() == ["doctor"], answer.stderr


def test_without_shtab_completion_says_what_to_install(
    tp_validate: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert tp_validate("completion", "zsh") == (
        2,
        "",
        "tp-validate: completion needs shtab: pip install shtab (or 'torchtitan-tp-validate[completion]').\n",
    )


def test_help_names_every_subcommand_and_the_exit_statuses(tp_validate: Program) -> None:
    status, out, _ = tp_validate("--help")
    assert status == 0
    for word in (*SUBCOMMANDS, "0 all fits, 1 something"):
        assert word in out
    for command in SUBCOMMANDS:
        assert tp_validate(command, "--help").status == 0


def test_the_hooks_call_what_exists(tp_validate: Program, config_file: Path) -> None:
    text = (ROOT / ".pre-commit-hooks.yaml").read_text()
    entries = re.findall(r"entry: tp-validate (.*)", text)
    assert [entry.split()[0] for entry in entries] == ["check", "audit"]
    args = re.search(r"args: \[(.*)\]", text)
    assert args is not None
    words = [word.strip().strip('"') for word in args[1].split(",")]
    # pre-commit puts the changed files last
    assert tp_validate(*entries[0].split(), *words, config_file).status == 1
    patterns = re.findall(r"files: (.*)", text)
    assert re.search(patterns[0], "models/a/config.json")
    assert not re.search(patterns[0], "models/a/tokenizer_config.json")
