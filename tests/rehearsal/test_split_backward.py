"""Schedules that compute the gradients of weights apart, beside what takes the weights or the graph away."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest

from tests.rehearsal import warm
from torchtitan_tp_validate.rehearsal.findings import Rehearsal

pytestmark = pytest.mark.xdist_group("split backward")

ALWAYS = ("--parallelism.fsdp_reshard_after_forward", "always")
Rehearse = Callable[[str], Rehearsal]


def run_of(schedule: str, checkpointing: str, *more: str) -> dict[str, Any]:
    """A pipeline of a dense model under FSDP."""
    words = ["--parallelism.pipeline_parallel_degree", "2", "--parallelism.data_parallel_shard_degree", "2"]
    words += ["--parallelism.pipeline_parallel_schedule", schedule, *more]
    if version("torchtitan").startswith("0.2"):
        section = "--activation_checkpoint"
        words += ["--model.name", "llama3", "--model.flavor", "debugmodel"]
        words += [f"{section}.mode", checkpointing, f"{section}.selective_ac_option", "op"]
    else:
        words += ["--module", "llama3", "--config", "llama3_debugmodel", "--training.disable_cuda_graphs"]
        words.append(f"activation-checkpoint:{checkpointing}")
    return {"arguments": words, "ranks": 4}


@pytest.fixture(scope="module")
def rehearse(tmp_path_factory: pytest.TempPathFactory) -> Rehearse:
    requests = {
        "sharded again": run_of("InterleavedZeroBubble", "full", *ALWAYS),
        "sharded again repaired": run_of("InterleavedZeroBubble", "full", *ALWAYS) | {"repair": True},
        "recomputed selectively": run_of("ZBVZeroBubble", "selective"),
        "another schedule": run_of("Interleaved1F1B", "selective", *ALWAYS) | {"repair": True},
    }
    out = tmp_path_factory.mktemp("split-backward")
    warm.rehearse_all(requests, out)
    return lambda name: warm.found(out, name)


def test_gradients_of_weights_that_were_sharded_again_are_missed_refused_and_repaired(
    rehearse: Rehearse,
) -> None:
    seen = rehearse("sharded again")
    assert (seen.outcome, seen.degrees) == ("differs", {"dp_shard": 2, "pp": 2})
    assert "zero" in {one.looks_like for one in seen.differences if one.what == "gradient"}
    assert "NUM015 the installed torchtitan trains this model wrong" in seen.verdict
    repaired = rehearse("sharded again repaired")
    assert (repaired.outcome, repaired.verdict) == ("equal", "fits")


def test_a_graph_that_is_recomputed_selectively_is_gone_and_the_run_is_refused(rehearse: Rehearse) -> None:
    seen = rehearse("recomputed selectively")
    assert seen.outcome == "dies"
    assert any("Trying to backward an extra time" in end["error"] for end in seen.ends), seen.ends
    assert "PP010 ZBVZeroBubble meets selective activation checkpointing" in seen.verdict


def test_another_schedule_trains_what_one_process_trains(rehearse: Rehearse) -> None:
    seen = rehearse("another schedule")
    assert (seen.outcome, seen.verdict) == ("equal", "fits")
