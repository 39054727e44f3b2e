"""What ``tp-validate doctor`` says of the installed torchtitan."""

from __future__ import annotations

import re
from importlib.metadata import version

from tests.core.cli.conftest import Program
from torchtitan_tp_validate import installed
from torchtitan_tp_validate.identity import torchtitan_identity


def test_the_doctor_says_what_is_found_and_guarded(tp_validate: Program) -> None:
    status, out, _ = tp_validate("doctor")
    assert status == 0
    assert f"torchtitan {torchtitan_identity()}\n" in out
    assert f"torch {version('torch')}\n" in out
    assert re.search(r"^guarded +llama3: torchtitan\.models\.llama3\..*parallelize_llama: guarded", out, re.M)
    assert re.search(r"^not guarded +\w+: \w+: torchtitan .* has no such model$", out, re.M)
    assert not installed().active
