"""A rehearsal finds faults of the kinds that torchtitan's history shows, and names the module."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.forked import run_program
from tests.rehearsal.planted import FAULTS, JOBS

pytestmark = [pytest.mark.requires(torchtitan="0.3"), pytest.mark.xdist_group("planted")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Job or fault -> what the rehearsal says."""
    out = tmp_path_factory.mktemp("planted")
    run_program("tests.rehearsal.planted", out)
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("job", JOBS)
def test_without_a_fault_there_is_no_alarm(results: Any, job: str) -> None:
    assert results[f"{job} without a fault"]["outcome"] == "equal"


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(results: Any, name: str) -> None:
    fault, seen = FAULTS[name], results[name]
    assert seen["outcome"] == fault.outcome
    ends = [f"{end['stage']} {end['error']}" for end in seen["ends"]]
    first = [one[field] for one in seen["differences"][:1] for field in ("what", "name", "looks_like")]
    named = [seen["output"], *first, *ends]
    assert any(fault.named in one for one in named), named


def test_most_faults_are_named_by_their_module() -> None:
    """The counts of `docs/rehearsal.md`."""
    by_module = [
        fault for fault in FAULTS.values() if fault.named.startswith(("layers", "norm", "lm", "tok"))
    ]
    assert (len(FAULTS), len(by_module)) == (30, 19)
