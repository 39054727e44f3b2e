"""Every command on every page is run, and its output compared."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Block, assert_shows, blocks, parameters
from tests.forked import in_forks, run_module
from torchtitan_tp_validate.cli import build_parser

BLOCKS = blocks("console")
ELSEWHERE = {
    "pip install .": "test_packaging.py",
    "scripts/quickstart": "test_the_quickstart_prints_what_the_readme_shows",
    "scripts/test": "the test command itself",
}


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """``(command, output)`` of a block; output that stands in a block of its own belongs to the last."""
    examples = block.text.removeprefix("$ ").split("\n$ ")
    for number, example in enumerate(examples):
        command, _, shown = example.partition("\n")
        yield command, shown or (block.shown if number == len(examples) - 1 else "")


def test_every_command_is_run_here_or_elsewhere() -> None:
    found = {command for block in BLOCKS for command, _ in commands(block)}
    others = {command for command in found if not command.startswith(("tp-validate ", "echo $?"))}
    assert others == set(ELSEWHERE)


def test_there_is_an_example_of_every_subcommand() -> None:
    shown = {
        command.split()[1] for block in BLOCKS for command, _ in commands(block) if "tp-validate" in command
    }
    (subcommands,) = (
        action for action in build_parser()._actions if action.dest == "command" or action.choices
    )
    assert subcommands.choices is not None
    # The table is a picture, and completion a script.
    assert shown | {"table", "completion"} == set(subcommands.choices)
    assert "`tp-validate table`" in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert (ROOT / "scripts" / "matrix.svg").stat().st_size > 10_000


@in_forks
@pytest.mark.parametrize("block", parameters(BLOCKS))
def test_the_output_is_what_is_shown(block: Block, tmp_path: Path) -> None:
    status = 0
    for command, shown in commands(block):
        if command in ELSEWHERE:
            continue
        if command == "echo $?":
            assert shown.strip() == str(status)
            continue
        arguments = shlex.split(command)[1:]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        ended = run_module(
            "torchtitan_tp_validate",
            arguments,
            out=tmp_path,
            cwd=block.folder,
            env={"PYTHONPATH": path},
            timeout=300,
        )
        status = ended.returncode
        # Warnings of other packages come first on standard error.
        real = ended.output or ended.errors[ended.errors.find("tp-validate: ") :]
        pattern = re.escape(f"{shown.rstrip()}\n").replace(re.escape("[...]"), ".*")
        assert re.fullmatch(pattern, real, flags=re.DOTALL), f"shown:\n{shown}\nreal:\n{real}"


@pytest.mark.parametrize("block", parameters([b for b in BLOCKS if b.text == "$ scripts/quickstart\n"]))
def test_the_quickstart_prints_what_the_readme_shows(block: Block) -> None:
    result = subprocess.run(
        [ROOT / "scripts" / "quickstart"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert_shows(block.shown, result.stdout)
