"""The walk from a config.json to the output, as docs/architecture.md lists it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.cli.conftest import Program
from tests.core.walks import in_the_map, walk
from torchtitan_tp_validate.cli import build_parser
from torchtitan_tp_validate.cli.commands import check
from torchtitan_tp_validate.cli.formats import FORMATS

FITS, REFUSED = in_the_map("config.json"), in_the_map("its refusal, besides")


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize(("tp", "files"), [("2", FITS), ("4", [*FITS, *REFUSED])])
def test_from_a_config_to_the_output_no_file_comes_back(
    tp_validate: Program, config_file: Path, output_format: str, tp: str, files: list[str]
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
    assert [file for file in found.files if file in FITS] == FITS
    assert set(found.files) == set(files)
    assert len(FITS) <= 9
