"""The guards where transformers is installed and torchtitan is not."""

from __future__ import annotations

from pathlib import Path

from tests.core.fake_torchtitan import FakeTorchtitan
from tests.core.test_guards import HIDDEN


def test_without_torchtitan_transformers_alone_is_guarded(tmp_path: Path) -> None:
    result = FakeTorchtitan(tmp_path).run(HIDDEN.format(hidden=("torchtitan",)))
    assert (result.returncode, result.stdout) == (0, "transformers\n"), result.stderr
    assert "torchtitan is not installed" not in result.stderr
