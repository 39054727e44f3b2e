"""The walk from a config.json to the output, as far as it leads through the command line's own files."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.core.cli.conftest import Program
from torchtitan_tp_validate import cli
from torchtitan_tp_validate.cli.formats import FORMATS

CLI = Path(cli.__file__).parent
WALK = [
    "commands/check.py",
    "reports.py",
    "files.py",
    "verdicts.py",
    "formats.py",
    "output.py",
    "arguments.py",
    "escape.py",
]


class Walk:
    """Records, from the subcommand's ``run`` on, which files of the command line are entered from which.

    Attributes:
        files: in the order in which they are first entered.
        returns: calls to a file that was left: entered before the file that calls it, and not on the stack.
    """

    def __init__(self) -> None:
        self.files: list[str] = []
        self.returns: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        here = _file(frame)
        if event != "call" or here is None or not (self.files or frame.f_code.co_name == "run"):
            return
        if here not in self.files:
            self.files.append(here)
        stack = []
        back = frame.f_back
        while back is not None:
            stack.append(_file(back))
            back = back.f_back
        caller = next((file for file in stack if file is not None), None)
        known = self.files.index(caller) if caller in self.files else -1
        # A generator that goes on hands over what was found: that is no call.
        handed_over = frame.f_code.co_flags & inspect.CO_GENERATOR
        if known > self.files.index(here) and here not in stack and not handed_over:
            self.returns.append(f"{caller} -> {here}: {frame.f_code.co_name}")


def _file(frame: FrameType) -> str | None:
    path = Path(inspect.getfile(frame.f_code))
    return path.relative_to(CLI).as_posix() if path.is_relative_to(CLI) else None


@pytest.mark.parametrize("output_format", FORMATS)
def test_from_a_config_to_the_output_no_file_is_come_back_to(
    tp_validate: Program, config_file: Path, output_format: str
) -> None:
    command = ("check", "--hf-config", config_file, "--tp", "4", "--output-format", output_format)
    once = tp_validate(*command)  # what is imported late is imported now
    walk = Walk()
    sys.setprofile(walk)
    try:
        again = tp_validate(*command)
    finally:
        sys.setprofile(None)
    assert again == once
    assert walk.returns == []
    # The encoder escapes what stands in JSON.
    assert walk.files == [file for file in WALK if file != "escape.py" or output_format != "json"]
