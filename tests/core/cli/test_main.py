"""Help, and the hooks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.core.cli.conftest import SUBCOMMANDS, Program
from torchtitan_tp_validate.cli import build_parser

ROOT = Path(__file__).parents[3]


def test_help_names_every_subcommand_and_the_exit_statuses(tp_validate: Program) -> None:
    status, out, _ = tp_validate("--help")
    assert status == 0
    for word in (*SUBCOMMANDS, "0 all fits, 1 something"):
        assert word in out
    assert "\nexamples:\n  tp-validate check --hf-config " in out
    assert tp_validate("-V") == tp_validate("--version")
    assert tp_validate("-V").out.startswith("tp-validate ")


@pytest.mark.parametrize("command", [*SUBCOMMANDS, "hf-audit"])
def test_every_help_has_examples_that_are_understood(tp_validate: Program, command: str) -> None:
    status, out, _ = tp_validate(command, "--help")
    assert status == 0
    _, _, examples = out.partition("\nexamples:\n")
    lines = [line for line in examples.splitlines() if "tp-validate " in line]
    assert lines
    for line in lines:
        (words,) = re.findall(rf"tp-validate ({command}\b[^|>()]*)", line)
        arguments = shlex.split(words.rstrip('"'))
        ours = arguments[: arguments.index("--")] if "--" in arguments else arguments
        assert build_parser(command).parse_args(ours).command == command


def test_the_hooks_call_what_exists(tp_validate: Program, config_file: Path) -> None:
    text = (ROOT / ".pre-commit-hooks.yaml").read_text()
    entries = re.findall(r"entry: tp-validate (.*)", text)
    assert [entry.split()[0] for entry in entries] == ["check", "audit"]
    args = re.search(r"args: \[(.*)\]", text)
    assert args is not None
    words = [word.strip().strip('"') for word in args[1].split(",")]
    # pre-commit puts the changed files last
    hook = (*entries[0].split(), *words)
    assert tp_validate(*hook, config_file).status == 1
    unrelated = config_file.parent / "tool.json"
    unrelated.write_text('{"compilerOptions": {"strict": true}}')
    status, out, _ = tp_validate(*hook, unrelated)
    assert (status, out.startswith(f"Skipped, not judged:\n  {unrelated}: ")) == (0, True)
    patterns = re.findall(r"files: (.*)", text)
    assert re.search(patterns[0], "models/a/config.json")
    assert not re.search(patterns[0], "models/a/tokenizer_config.json")
