"""The walk from a config.json to the output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.core.cli.conftest import Program
from tests.core.walks import walk
from torchtitan_tp_validate.cli import build_parser
from torchtitan_tp_validate.cli.commands import check
from torchtitan_tp_validate.cli.formats import FORMATS

FITS = [
    "cli/commands/check.py",
    "cli/files.py",
    "releases/huggingface.py",
    "releases/key_value_heads.py",
    "releases/huggingface_sizes.py",
    "cli/verdicts.py",
    "validate.py",
    "plan.py",
    "cli/formats.py",
]
TO_WORD_A_REFUSAL = ["errors.py", "advice.py"]


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize(("tp", "more"), [("2", ()), ("4", TO_WORD_A_REFUSAL)])
def test_from_a_config_to_the_output_no_file_comes_back(
    tp_validate: Program, config_file: Path, output_format: str, tp: str, more: Sequence[str]
) -> None:
    words = ["check", "--hf-config", str(config_file), "--tp", tp, "--output-format", output_format]
    status = tp_validate(*words).status  # what is imported late is imported now
    options = build_parser("check").parse_args(words)
    options.torchtitan_arguments = None
    statuses: list[int] = []
    found = walk(
        lambda: statuses.append(check.run(options)),
        lambda _, value: isinstance(value, str) and value == str(config_file),
    )
    assert statuses == [status]
    assert found.back == []
    assert set(found.files) == {*FITS, *more}
    assert found.files[:3] + found.files[-1:] == FITS[:3] + FITS[-1:]
