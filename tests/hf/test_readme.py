"""What the README shows of the audit is what it prints."""

from __future__ import annotations

import re
import shlex

import pytest
import transformers

from tests.distributed.harness import REPOSITORY
from torchtitan_tp_validate.cli import main


@pytest.mark.skipif(transformers.__version__ != "5.23.0", reason="the README shows transformers 5.23.0")
def test_the_audit_prints_what_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.search(r"\$ tp-validate (hf-audit .*)\n```\n\n```text\n(.*?)```", readme, flags=re.DOTALL)
    assert found is not None
    assert main(shlex.split(found[1])) == 1
    assert capsys.readouterr().out == found[2]
