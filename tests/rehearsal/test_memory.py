"""What a layout is said to hold is what real ranks hold; and what the search says, runs as it stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from torchtitan_tp_validate.cli.torchtitan import search_layouts
from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.job import Options
from torchtitan_tp_validate.rehearsal.memory import state_meter
from torchtitan_tp_validate.search import Layout, Search

OLD = version("torchtitan").startswith("0.2")
RANKS = 4
# Flex attention cuts its masks over CP by whole blocks of 128.
SMALL = ["--training.seq_len", "256", "--training.local_batch_size", "4"]


def run_of(model: str, flavor: str, config: str = "") -> list[str]:
    if OLD:
        named = ["--model.name", model, "--model.flavor", flavor]
    else:
        named = ["--module", model, "--config", config, "--training.disable_cuda_graphs"]
    schedule = ["--parallelism.pipeline_parallel_schedule", "1F1B"]
    return [*named, *SMALL, *schedule]


RUNS = {
    "dense": run_of("llama3", "debugmodel", "llama3_debugmodel"),
    # In 0.2.x deepseek_v3's routers train wrong under TP, which changes no shard.
    "experts": run_of("deepseek_v3", "debugmodel", "deepseek_v3_debugmodel"),
}
ALLOWED = ("NUM001", "NUM002", "NUM008", "NUM009") if OLD else ("NUM006",)
MOST = {"dense": 5, "experts": 3}


def spread(layouts: Sequence[Layout], most: int) -> list[Layout]:
    """Some of many, from the first to the last."""
    step = max(len(layouts) / most, 1)
    return [layouts[int(index * step)] for index in range(min(most, len(layouts)))]


def found(arguments: Sequence[str]) -> tuple[Search, list[Layout]]:
    options = Options(world_size=RANKS, allow=ALLOWED)
    search, _ = search_layouts(arguments, options, (), near=False)
    return search, list(search.confirmed())


@pytest.mark.parametrize("name", RUNS)
def test_real_ranks_train_what_is_found_and_hold_what_is_measured(name: str, tmp_path: Path) -> None:
    arguments = RUNS[name]
    search, layouts = found(arguments)
    some = spread([one for one in layouts if one.of("cp") <= 2], MOST[name])
    jobs = [([*arguments, *search.arguments(layout)], RANKS) for layout in some]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    program = [sys.executable, "-m", "tests.rehearsal.held", str(tmp_path)]
    with (tmp_path / "output.txt").open("w") as output:
        subprocess.run(
            program,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            check=True,
            timeout=600,
        )
    held = json.loads((tmp_path / "held.json").read_text(encoding="utf-8"))
    with state_meter(arguments) as meter:
        for layout, real in zip(some, held, strict=True):
            state = meter.measure(search.fields(layout), RANKS)
            assert (state.parameters, state.optimizer) == (real["parameters"], real["optimizer"])
            # Without FSDP 0.2.x leaves a gradient as autograd made it.
            if not OLD or layout.of("dp_shard") * layout.of("cp") > 1:
                assert state.gradients == real["gradients"], search.arguments(layout)
            # No less than an even part of what they share.
            assert meter.whole.total <= state.total * RANKS // layout.of("dp_replicate")


def test_a_job_that_cannot_be_laid_out_is_told_why() -> None:
    with (
        state_meter(["--no-such-option"]) as meter,
        pytest.raises(RehearsalError, match="cannot be laid out"),
    ):
        meter.measure({}, RANKS)


def test_a_layout_that_torchtitan_refuses_is_told_why() -> None:
    fields = {"tensor_parallel_degree": 1, "data_parallel_shard_degree": 3}
    with state_meter(RUNS["dense"]) as meter:
        with pytest.raises(RehearsalError, match="AssertionError: Invalid parallel dims"):
            meter.measure(fields, RANKS)
        # It answers on.
        assert meter.measure({**fields, "data_parallel_shard_degree": 4}, RANKS).total
