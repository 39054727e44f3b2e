"""What a layout is said to hold is what real ranks hold; and what the search says, runs as it stands."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.forked import run_program
from torchtitan_tp_validate.cli import main
from torchtitan_tp_validate.cli.torchtitan import judge_run, search_layouts
from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG
from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.job import Options
from torchtitan_tp_validate.rehearsal.memory import Sent, Traffic, layout_meter
from torchtitan_tp_validate.search import Layout, Search

OLD = version("torchtitan").startswith("0.2")
RANKS = 4
SMALL = ["--training.seq_len", "256", "--training.local_batch_size", "2"]
# As what trains here does, whose experts get equal shares.
SMALL += ["--training.mixed_precision_param", "float32", "--debug.moe_force_load_balance"]


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
    "experts": [
        *run_of("deepseek_v3", "debugmodel", "deepseek_v3_debugmodel"),
        *("--training.seq_len", "64"),
    ],
}
# Two stages for each rank, and as many microbatches.
RUNS["interleaved"] = [
    *RUNS["dense"],
    *("--parallelism.pipeline_parallel_schedule", "Interleaved1F1B"),
    *("--training.local_batch_size", "4"),
]
ALLOWED = ("NUM001", "NUM002", "NUM008", "NUM009") if OLD else ("NUM006",)
KINDS = {
    "dense": (
        {"dp_replicate": 2, "dp_shard": 2},
        {"tp": 2, "dp_shard": 2},
        {"cp": 2, "dp_replicate": 2},
        {"tp": 2, "dp_replicate": 2},
        {"pp": 2, "tp": 2},
        {"pp": 2, "dp_shard": 2},
    ),
    "experts": (
        {"ep": 2, "dp_replicate": 2, "dp_shard": 2},
        {"pp": 2, "ep": 2, "dp_shard": 2},
    ),
    "interleaved": ({"pp": 2, "tp": 2}, {"pp": 4}),
}
"""Of which layouts it is shown: TP beside replicas without shards is 0.3.x's alone."""
MORE = {"dense": 5, "experts": 3}
"""Of how many others, where there is time."""


def spread(layouts: Sequence[Layout], most: int) -> list[Layout]:
    """Some of many, from the first to the last."""
    count = min(most, len(layouts))
    return [layouts[index * len(layouts) // count] for index in range(count)]


def found(arguments: Sequence[str]) -> tuple[Search, list[Layout]]:
    options = Options(world_size=RANKS, allow=ALLOWED)
    search, _ = search_layouts(arguments, options, (), near=False)
    return search, list(search.confirmed())


def above_one(search: Search, layout: Layout) -> dict[str, int]:
    """The degrees of a layout that are more than 1."""
    return {axis: layout.of(axis) for axis in search.axes if layout.of(axis) > 1}


def train(jobs: list[tuple[list[str], int]], out: Path) -> list[Any]:
    """Return what the fullest rank of each job holds after a step, or why there is none."""
    (out / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    run_program("tests.rehearsal.held", out)
    held: list[Any] = json.loads((out / "held.json").read_text(encoding="utf-8"))
    return held


def test_a_sequence_of_no_whole_blocks_dies_and_is_refused(tmp_path: Path) -> None:
    flex = run_of("llama3", "debugmodel_flex_attn", "llama3_debugmodel")
    names = () if OLD else ("spmd_types", "partial_dtensor", "full_dtensor")
    backends = [["--parallelism.spmd_backend", name] for name in names] or [[]]
    jobs = [
        [*flex, "--training.seq_len", seq_len, "--parallelism.context_parallel_degree", "2", *backend]
        for backend in backends
        for seq_len in ("192", "256")
    ]
    outcomes = train([(job, 2) for job in jobs], tmp_path)
    for job, outcome in zip(jobs, outcomes, strict=True):
        report = judge_run(job, Options(world_size=2, allow=ALLOWED))
        error = report.judgements[0].error
        codes = [problem.code for problem in error.problems] if error else []
        if "192" in job:
            assert "NotImplementedError: Q_LEN 192 is not divisible by CP mesh world size 2" in outcome
            assert codes == ["CP003"]
        else:
            assert outcome["parameters"]
            assert codes == []


@pytest.mark.requires(torchtitan="0.2.2")
def test_what_upstream_issues_are_about_dies_and_is_refused(tmp_path: Path) -> None:
    two = ["--parallelism.tensor_parallel_degree", "2"]
    under_cp = [*run_of("qwen3", "debugmodel_moe"), *two, "--parallelism.context_parallel_degree", "2"]
    async_tp = [*RUNS["dense"], *two, "--parallelism.enable_async_tensor_parallel"]
    runs = [
        (under_cp, 4, "CP004", "sdpa_input_fn"),
        (async_tp, 2, "RUN002", "RuntimeError: Async TP requires"),
    ]
    outcomes = train([(job, ranks) for job, ranks, _, _ in runs], tmp_path)
    for (job, ranks, code, words), outcome in zip(runs, outcomes, strict=True):
        assert words in outcome
        error = judge_run(job, Options(world_size=ranks, allow=ALLOWED)).judgements[0].error
        assert error is not None
        assert [problem.code for problem in error.problems] == [code]


@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, 0) for name in KINDS), *(pytest.param(*more, marks=pytest.mark.long) for more in MORE.items())],
)
def test_real_ranks_train_what_is_found_and_hold_and_send_what_is_measured(
    name: str, more: int, tmp_path: Path
) -> None:
    arguments = RUNS[name]
    search, layouts = found(arguments)
    some = [one for one in layouts if above_one(search, one) in KINDS[name]]
    some += spread([one for one in layouts if one not in some], more)
    jobs = [([*arguments, *search.arguments(layout)], RANKS) for layout in some]
    held = train(jobs, tmp_path)
    counted = 0
    with layout_meter(arguments) as meter:
        for layout, real in zip(some, held, strict=True):
            state = meter.measure(search.fields(layout), RANKS)
            assert (state.parameters, state.optimizer) == (real["parameters"], real["optimizer"])
            # Without FSDP 0.2.x leaves a gradient as autograd made it.
            if not OLD or layout.of("dp_shard") * layout.of("cp") > 1:
                assert state.gradients == real["gradients"], search.arguments(layout)
            traffic = meter.follow_step(search.fields(layout), RANKS)
            counted += check_sent(layout, traffic, real["sent"])
            if not traffic.uncounted:
                # On a CPU 0.3.x multiplies out its attention, scores and all.
                assert traffic.peak <= 1.01 * real["peak"]
                assert not OLD or traffic.peak >= 0.97 * real["peak"]
            # No less than an even part of what they share.
            assert meter.whole.total <= state.total * RANKS // layout.of("dp_replicate")
    assert counted


def check_sent(layout: Layout, traffic: Traffic, real: Any) -> bool:
    """Whether anything was counted; what was is what real ranks have sent."""
    followed = "the job cannot be followed through a step: "
    if OLD and layout.of("dp_replicate") > 1 and layout.of("dp_shard") * layout.of("cp") == 1:
        # torch's DDP copies gradients into memory of its own.
        assert traffic.uncounted.startswith(f"{followed}raised: RuntimeError: The tensor has a non-zero")
    else:
        assert traffic.uncounted == ""
        sent = [Sent(one["rank"], tuple(one["axes"]), tuple(one["ranks"]), one["bytes"]) for one in real]
        assert Counter(traffic.sent) == Counter(sent)
        return True
    return False


def test_what_is_written_down_trains_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(tmp_path)]))
    form, file = ("toml", "on_4.toml") if OLD else ("recipe", "on_4.py")
    words = ["layouts", "--world-size", str(RANKS), "--keep", "tp", "--output-file"]
    run = ["--", *RUNS["dense"], "--parallelism.tensor_parallel_degree", "2"]
    assert main([*words, str(tmp_path / file), "--emit", form, *run]) == 0
    assert main([*words, str(tmp_path / "words"), "--emit", "cli", *run]) == 0
    written = ["--job.config_file", str(tmp_path / file)]
    if not OLD:
        written = ["--module", "on_4", "--config", "llama3_debugmodel_on_4"]
    jobs = [written, shlex.split((tmp_path / "words").read_text(encoding="utf-8"))]
    first, second = train([(job, RANKS) for job in jobs], tmp_path)
    # What an allocator gives out at once depends on when threads take it back.
    assert {**first, "peak": 0} == {**second, "peak": 0}
    assert first["parameters"] == first["gradients"] > 0


def test_a_job_that_cannot_be_laid_out_is_told_why() -> None:
    with (
        layout_meter(["--no-such-option"]) as meter,
        pytest.raises(RehearsalError, match="cannot be laid out"),
    ):
        meter.measure({}, RANKS)


def test_a_layout_that_torchtitan_refuses_is_told_why() -> None:
    fields = {"tensor_parallel_degree": 1, "data_parallel_shard_degree": 3}
    with layout_meter(RUNS["dense"]) as meter:
        with pytest.raises(RehearsalError, match="AssertionError: Invalid parallel dims"):
            meter.measure(fields, RANKS)
        # It answers on.
        assert meter.measure({**fields, "data_parallel_shard_degree": 4}, RANKS).total


@pytest.mark.requires(torchtitan="0.2.2")
def test_a_pipeline_that_cannot_be_followed_is_told_why() -> None:
    schedule = ["--parallelism.pipeline_parallel_schedule", "DualPipeV"]
    fields = {**dict.fromkeys(FLAGS.values(), 1), PIPELINE_FLAG: 2}
    with layout_meter([*RUNS["interleaved"], *schedule]) as meter:
        traffic = meter.follow_step(fields, 2)
    assert traffic == Traffic(
        uncounted="the job cannot be followed through a step: raised: RehearsalError: "
        "DualPipeV computes on two streams of a GPU at a time: to have it counted, set "
        "parallelism.pipeline_parallel_expert_parallel_overlap to false."
    )
