"""What the history of torchtitan says of a patch: it applies, is refused, or breaks a test of the tree."""

from __future__ import annotations

import sys
from pathlib import Path

import history

from tests.patches.trees import make, put, snapshot

HELPER = "torchtitan/distributed/tensor_parallel.py"
# Names the file that the patch changes; the other does not.
STRICT = """
from pathlib import Path


def test_the_file_is_as_long_as_it_was():
    import torchtitan.distributed.tensor_parallel as changed

    assert len(Path(changed.__file__).read_text().splitlines()) {0}
"""


def judged(checkout: Path, scratch: Path) -> history.Judged:
    scratch.mkdir()
    found = history.Judged("a tree")
    history.patch(found, checkout, sys.executable, scratch)
    return found


def test_a_tests_failure_counts_where_the_patch_brings_it(checkout: Path, tmp_path: Path) -> None:
    lines = len((checkout / HELPER).read_text(encoding="utf-8").splitlines())
    for name, condition in (("before", f"== {lines}"), ("never", "== 0")):
        put(checkout, f"tests/unit_tests/test_{name}.py", STRICT.format(condition))
    before = snapshot(checkout)
    found = judged(checkout, tmp_path / "scratch")
    assert found.patch == "broken"
    (problem,) = found.wrong
    assert problem.startswith(
        "patch: tests.unit_tests.test_before.test_the_file_is_as_long_as_it_was fails with it"
    )
    assert snapshot(checkout) == before


def test_a_tree_without_a_place_is_refused_with_the_reason(tmp_path: Path) -> None:
    checkout = make(tmp_path / "tree", "layers")
    (checkout / HELPER).unlink()
    found = judged(checkout, tmp_path / "scratch")
    assert (found.patch, found.wrong) == ("refused", [])
    assert found.notes == [
        "patch: Cannot make the patch: there is no torchtitan/distributed/tensor_parallel.py to put "
        "validate_tp_compat in."
    ]
