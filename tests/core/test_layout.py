"""Each rule on a run as a whole: a run that breaks it, and one a step away that does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from torchtitan_tp_validate.checkpoint import DATA_LOADER, STATES, Checkpoint
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.errors import Problem, RunError, TPCompatError
from torchtitan_tp_validate.layout import (
    SCHEDULES,
    Pipeline,
    Run,
    Sizes,
    Validation,
    find_problems,
    known_shards,
    layers_of_stages,
    stages,
)
from torchtitan_tp_validate.plan import Plan, ShardedDim
from torchtitan_tp_validate.rules import FAULTS, LINES, RULES, RUN_RULES, Line, Otherwise, RunRule
from torchtitan_tp_validate.validate import run_error

SPMD, DTENSOR, OLD = Line.SPMD_TYPES, Line.DTENSOR, Line.TORCHTITAN_0_2
MODULES = ("tok_embeddings", "norm", "lm_head")


def run(line: Line = SPMD, pipeline: dict[str, Any] | None = None, **fields: Any) -> Run:
    """A run of 8 layers that breaks nothing, but for what is given: degrees, or fields of `Run`."""
    names = {name for name in fields if name in Degrees.__dataclass_fields__}
    degrees = Degrees(**{"tp": 1, **{name: fields.pop(name) for name in names}})
    given = {"n_layers": 8, "local_batch_size": 8, "modules": MODULES, **fields}
    return Run(degrees, line, Pipeline(**(pipeline or {})), **given)


def validating(batch_size: int | None, *, degree: int = 2, microbatch_size: int = 1) -> Run:
    """A pipeline that trains on a batch of 8, and validates on one of so many sequences."""
    pipeline = {"degree": degree, "microbatch_size": microbatch_size}
    return run(OLD, pipeline, validation=Validation(batch_size=batch_size))


def parts(*stages_of: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(part.split()) for part in stages_of)


ALL = [f"layers.{index}" for index in range(8)]
HALVES = parts("tok_embeddings " + " ".join(ALL[:4]), " ".join(ALL[4:]) + " norm lm_head")

EVERYTHING = frozenset((DATA_LOADER, *STATES))

DATA_ALONE = {"shards_with_experts": False, "has_experts": True}
ROWS = {"full_dtensor": True, "has_experts": True}
BUBBLE = {"degree": 2, "schedule": "InterleavedZeroBubble"}
DUAL = {"degree": 2, "schedule": "DualPipeV"}

TOKENS = Sizes("tokens_at_a_time", "tokens_in_a_step", "tokens_at_a_time", in_a_row=True)


def in_tokens(pp: int = 2, microbatches: int = 4, **fields: Any) -> Run:
    """A run of main: 64 tokens at a time, and as many microbatches as it is told."""
    pipeline = {"degree": pp, "microbatches": microbatches}
    return run(pipeline=pipeline, sizes=TOKENS, local_batch_size=64, **fields)


CASES: dict[str, list[tuple[Run, Run]]] = {
    "MESH001": [
        (run(dp_shard=2, tp=2, world_size=8), run(dp_shard=4, tp=2, world_size=8)),
        (run(dp_shard_is_known=False, tp=4, world_size=2), run(dp_shard=2, tp=4)),
        (run(pipeline={"degree": 2}, world_size=6, dp_shard=2), run(pipeline={"degree": 2}, dp_shard=2)),
    ],
    "MESH002": [
        (run(ep=4, dp_shard=2), run(ep=4, dp_shard=4)),
        (run(OLD, ep=4, etp=2, tp=2, dp_shard=2), run(OLD, ep=4, etp=2, tp=2, dp_shard=4)),
    ],
    "MESH003": [(run(OLD, ep=2, etp=2, tp=4, dp_shard=2), run(OLD, ep=2, etp=4, tp=4, dp_shard=2))],
    "MESH004": [
        (run(OLD, dp_replicate=2, tp=2), run(OLD, dp_replicate=2, tp=2, dp_shard=2)),
        (run(OLD, {"degree": 2}, dp_replicate=2), run(OLD, dp_replicate=2)),
        (run(OLD, dp_replicate=2, tp=2), run(SPMD, dp_replicate=2, tp=2)),
    ],
    "MESH005": [
        (run(OLD, ep=2, tp=2, shards_with_experts=True), run(OLD, ep=2, tp=2)),
        (run(OLD, ep=2, tp=2, shards_with_experts=True), run(OLD, ep=2, cp=2, shards_with_experts=True)),
        (
            run(OLD, ep=2, tp=2, shards_with_experts=True),
            run(OLD, ep=2, tp=2, shards_with_experts=True, has_every_mesh=True),
        ),
    ],
    "MESH006": [
        (run(OLD, ep=2, tp=4, **DATA_ALONE), run(OLD, ep=4, tp=4, **DATA_ALONE)),
        (run(OLD, ep=2, tp=4, **DATA_ALONE), run(OLD, ep=2, tp=4, dp_shard=2, **DATA_ALONE)),
        (run(OLD, ep=2, tp=4, **DATA_ALONE), run(OLD, ep=2, tp=4, cp=2, **DATA_ALONE)),
        (run(OLD, ep=2, tp=4, **DATA_ALONE), run(OLD, ep=2, tp=4)),
        (run(OLD, ep=2, tp=4, **DATA_ALONE), run(OLD, tp=4, **DATA_ALONE)),
        (run(OLD, ep=2, tp=4, **DATA_ALONE), run(OLD, ep=2, tp=4, shards_with_experts=False)),
    ],
    "MESH007": [
        (run(DTENSOR, ep=2, cp=2, tp=2, **ROWS), run(DTENSOR, cp=2, tp=2, **ROWS)),
        (run(DTENSOR, ep=2, cp=2, tp=2, **ROWS), run(DTENSOR, ep=2, tp=2, **ROWS)),
        (run(DTENSOR, ep=2, cp=2, tp=2, **ROWS), run(DTENSOR, ep=2, cp=2, **ROWS)),
        (run(DTENSOR, ep=2, cp=2, tp=2, **ROWS), run(DTENSOR, ep=2, cp=2, tp=2, has_experts=True)),
        (run(DTENSOR, ep=2, cp=2, tp=2, **ROWS), run(DTENSOR, ep=2, cp=2, tp=2, local_batch_size=1, **ROWS)),
        (run(DTENSOR, ep=2, cp=2, tp=2, **ROWS), run(DTENSOR, ep=2, cp=2, tp=2, full_dtensor=True)),
    ],
    "NODE001": [
        (run(tp=16, gpus_per_node=8), run(tp=8, gpus_per_node=8)),
        (run(ep=3, dp_shard=3, gpus_per_node=8), run(ep=2, dp_shard=2, gpus_per_node=8)),
    ],
    "PP001": [
        (run(pipeline={"degree": 4, "layers_per_stage": 4}), run(pipeline={"degree": 4})),
        (
            run(pipeline={"degree": 2, "parts": (HALVES[0][:2], HALVES[0][2:], HALVES[1])}),
            run(pipeline={"degree": 2, "parts": HALVES}),
        ),
    ],
    "PP002": [
        (
            run(pipeline={"degree": 2, "layers_per_stage": 2, "first_less": 0, "last_less": 0}),
            run(pipeline={"degree": 2, "layers_per_stage": 4, "first_less": 0, "last_less": 0}),
        ),
        (
            run(pipeline={"degree": 2, "schedule": "LoopedBFS", "layers_per_stage": 5}),
            run(pipeline={"degree": 2, "schedule": "LoopedBFS", "layers_per_stage": 3}),
        ),
        (
            run(pipeline={"degree": 2, "schedule": "ZBVZeroBubble", "parts": HALVES}),
            run(pipeline={"degree": 2, "schedule": "LoopedBFS", "parts": HALVES}),
        ),
    ],
    "PP003": [
        (
            run(
                pipeline={
                    "degree": 2,
                    "schedule": "LoopedBFS",
                    "parts": (HALVES[0], ("norms",), HALVES[1][:2], HALVES[1][2:]),
                }
            ),
            run(pipeline={"degree": 2, "parts": HALVES}),
        ),
        (run(pipeline={"degree": 4}, n_layers=1), run(pipeline={"degree": 4}, n_layers=2)),
        (run(pipeline={"degree": 4, "first_less": 5}), run(pipeline={"degree": 4, "first_less": 2})),
        (run(pipeline={"degree": 4, "last_less": 5}), run(pipeline={"degree": 4, "last_less": 2})),
    ],
    "PP004": [
        (
            run(pipeline={"degree": 2, "microbatch_size": 3}),
            run(pipeline={"degree": 2, "microbatch_size": 2}),
        ),
        (run(pipeline={"degree": 2, "microbatch_size": 3}), run(pipeline={"microbatch_size": 3})),
    ],
    "PP005": [
        (run(pipeline={"degree": 4}, local_batch_size=3), run(pipeline={"degree": 4}, local_batch_size=4)),
        (
            run(pipeline={"degree": 2, "schedule": "Interleaved1F1B"}, local_batch_size=5),
            run(pipeline={"degree": 2, "schedule": "Interleaved1F1B"}, local_batch_size=6),
        ),
        (
            run(pipeline={"degree": 2, "schedule": "DualPipeV"}, local_batch_size=3),
            run(pipeline={"degree": 2, "schedule": "ZBVZeroBubble"}, local_batch_size=3),
        ),
        (in_tokens(microbatches=1), in_tokens(microbatches=2)),
    ],
    "PP006": [
        (run(pipeline={"degree": 2, "is_supported": False}), run(pipeline={"is_supported": False})),
    ],
    "PP007": [
        (run(pipeline={"degree": 2, "schedule": "2F2B"}), run(pipeline={"degree": 2, "schedule": "gpipe"})),
        (
            run(pipeline={"degree": 2, "schedule": "2F2B"}),
            run(pipeline={"degree": 2, "schedule": "2F2B", "from_file": True}),
        ),
    ],
    "PP008": [
        (
            run(pipeline={"degree": 2, "parts": (HALVES[0], HALVES[1][1:])}),
            run(pipeline={"degree": 2, "parts": HALVES}),
        ),
        (
            run(pipeline={"degree": 2, "parts": (HALVES[0], (*HALVES[1], "layers.0"))}),
            run(pipeline={"degree": 1, "parts": (HALVES[0], (*HALVES[1], "layers.0"))}),
        ),
    ],
    "PP009": [
        (
            run(OLD, {**DUAL, "overlaps_experts": True}, ep=2, dp_shard=2),
            run(OLD, {**DUAL, "overlaps_experts": True}, dp_shard=2),
        ),
        (
            run(OLD, {**DUAL, "overlaps_experts": True}, ep=2, dp_shard=2),
            run(OLD, {**DUAL, "overlaps_experts": True, "schedule": "LoopedBFS"}, ep=2, dp_shard=2),
        ),
    ],
    "PP010": [
        (
            run(pipeline=BUBBLE, recomputes_selectively=True),
            run(pipeline={**BUBBLE, "schedule": "Interleaved1F1B"}, recomputes_selectively=True),
        ),
        (run(OLD, DUAL, recomputes_selectively=True), run(OLD, DUAL)),
    ],
    "PP011": [
        (run(pipeline=BUBBLE, gives_buffers_away=True), run(pipeline=BUBBLE)),
        (run(OLD, DUAL, gives_buffers_away=True), run(OLD, {"degree": 2}, gives_buffers_away=True)),
    ],
    "PP012": [
        (run(pipeline={"degree": 2, "lacks_cache": True}), run(pipeline={"lacks_cache": True})),
        (run(pipeline={"degree": 2, "lacks_cache": True}), run(pipeline={"degree": 2})),
    ],
    "SEQ001": [
        (run(cp=2, seq_len=62), run(cp=2, seq_len=64)),
        (run(OLD, seq_len=33), run(SPMD, seq_len=33)),
    ],
    "CP001": [
        (
            run(DTENSOR, {"degree": 4}, n_layers=2, cp=2, wraps_attention=True),
            run(DTENSOR, {"degree": 4}, n_layers=2, cp=2),
        ),
        (
            run(DTENSOR, {"degree": 4}, n_layers=2, cp=2, wraps_attention=True),
            run(DTENSOR, {"degree": 4}, n_layers=6, cp=2, wraps_attention=True),
        ),
    ],
    "CP002": [(run(cp=2, whole_sequence=("VarlenAttention",)), run(whole_sequence=("VarlenAttention",)))],
    "CP003": [
        (run(cp=2, seq_len=128, mask_block=128), run(cp=2, seq_len=256, mask_block=128)),
        (run(cp=4, seq_len=768, mask_block=128), run(cp=3, seq_len=768, mask_block=128)),
        (run(cp=2, seq_len=128, mask_block=128), run(cp=2, seq_len=128)),
        (run(cp=2, seq_len=96, mask_block=64), run(seq_len=96, mask_block=64)),
    ],
    "CP004": [
        (run(OLD, cp=2, uncut="it"), run(OLD, uncut="it")),
        (
            run(OLD, cp=2, tp=2, uncut="it", uncut_beside_tp=True),
            run(OLD, cp=2, uncut="it", uncut_beside_tp=True),
        ),
    ],
    "TIE001": [
        (run(OLD, dp_shard=2, shares_with_fsdp=True), run(OLD, shares_with_fsdp=True)),
        (run(OLD, cp=2, seq_len=64, shares_with_fsdp=True), run(OLD, cp=2, seq_len=64)),
    ],
    "BATCH001": [
        (run(dp_shard=2, dp_replicate=2, global_batch_size=16), run(dp_shard=2, global_batch_size=16)),
        (run(global_batch_size=0), run(global_batch_size=None)),
        (in_tokens(global_batch_size=64 * 6), in_tokens(global_batch_size=64 * 8)),
        (in_tokens(global_batch_size=64 * 6), in_tokens(pp=1, global_batch_size=64 * 6)),
    ],
    "DATA001": [(run(unfed="something"), run())],
    "VAL001": [
        (
            run(dp_shard=2, validation=Validation("validation.steps")),
            run(tp=2, validation=Validation("validation.steps")),
        ),
        (run(dp_replicate=2, validation=Validation("validator.steps")), run(dp_replicate=2)),
    ],
    "VAL002": [(run(validation=Validation(stopped_by="something")), run())],
    "VAL003": [
        (validating(4), validating(8)),
        (validating(12), validating(16)),
        (validating(6, microbatch_size=2), validating(4, microbatch_size=2)),
        (validating(4), validating(4, degree=1)),
        (validating(4), validating(None)),
    ],
    "VAL004": [
        (run(OLD, cp=2, seq_len=64, validation=Validation(counts_parts=True)), run(OLD, cp=2, seq_len=64))
    ],
    "OPT001": [
        (
            run(
                pipeline={"degree": 2},
                patterns=("tok", ".*"),
                parameters=("tok_embeddings.w", *(f"{name}.w" for name in ALL)),
            ),
            run(patterns=("tok", ".*"), parameters=("tok_embeddings.w", "layers.0.w")),
        ),
        (
            run(patterns=(".*", "tok"), parameters=("tok_embeddings.w", "layers.0.w")),
            run(patterns=("tok", ".*"), parameters=("tok_embeddings.w", "layers.0.w")),
        ),
    ],
    "CKPT002": [
        (
            run(checkpoint=Checkpoint("", EVERYTHING, EVERYTHING, data_ranks=2)),
            run(dp_replicate=2, checkpoint=Checkpoint("", EVERYTHING, EVERYTHING, data_ranks=2)),
        ),
        (
            run(dp_shard=4, checkpoint=Checkpoint("", EVERYTHING, EVERYTHING, data_ranks=2)),
            run(dp_shard=4, checkpoint=Checkpoint("", EVERYTHING - {DATA_LOADER}, EVERYTHING, data_ranks=2)),
        ),
        (
            run(dp_shard=4, checkpoint=Checkpoint("", EVERYTHING, EVERYTHING, data_ranks=2)),
            run(dp_shard=4, checkpoint=Checkpoint("", EVERYTHING, EVERYTHING)),
        ),
    ],
    "CKPT003": [
        (run(checkpoint=Checkpoint("", EVERYTHING)), run(checkpoint=Checkpoint(""))),
        (
            run(checkpoint=Checkpoint("", EVERYTHING, EVERYTHING - {"optimizer"})),
            run(checkpoint=Checkpoint("", EVERYTHING, EVERYTHING - {DATA_LOADER})),
        ),
    ],
    "CKPT004": [
        (run(checkpoint=Checkpoint("", missing=("w",))), run(checkpoint=Checkpoint(""))),
        (run(checkpoint=Checkpoint("", reshaped=("w is (8,), not (4,)",))), run()),
    ],
    "RUN001": [(run(refusal="no"), run())],
    "RUN002": [(run(late_refusal="no"), run())],
}


@pytest.mark.parametrize(
    ("code", "broken", "kept"), [(code, *case) for code, cases in CASES.items() for case in cases]
)
def test_a_broken_rule_is_told_and_a_step_away_is_not(code: str, broken: Run, kept: Run) -> None:
    assert [problem.code for problem in find_problems(broken)] == [code]
    assert find_problems(kept) == ()


def test_every_rule_has_a_case_and_a_condition() -> None:
    assert list(CASES) == list(RUN_RULES)


def test_every_rule_says_what_must_hold_what_happens_and_what_to_do() -> None:
    for code, rule in {**RUN_RULES, **FAULTS}.items():
        assert rule.code == code
        assert set(rule.otherwise) <= set(LINES)
        for text in (rule.about, rule.must, rule.instead, rule.source):
            assert text
            assert not text.endswith(".")
            assert text == " ".join(text.split())
        for otherwise in rule.otherwise.values():
            assert otherwise.text.endswith(".")
            assert otherwise.silent is ("SILENTLY" in otherwise.text)
    assert not set(RUN_RULES) & set(RULES)


def test_shards_that_are_left_to_the_ranks_are_known_with_them() -> None:
    left = Degrees(tp=2, cp=2, dp_replicate=2, dp_shard_is_known=False)
    assert known_shards(left, 2, None) == left
    assert known_shards(left, 2, 64) == replace(left, dp_shard=4, dp_shard_is_known=True)
    # As torchtitan has it; the product is then not the number of ranks.
    assert known_shards(left, 2, 70).dp_shard == 4
    assert known_shards(left, 2, 8) == left


@pytest.mark.parametrize(
    ("n_layers", "degree", "schedule", "first", "last", "dealt"),
    [
        (8, 2, "1F1B", 1, 1, [4, 4]),
        (8, 4, "1F1B", 1, 1, [2, 3, 2, 1]),
        (6, 4, "1F1B", 0, 0, [2, 2, 1, 1]),
        (8, 2, "Interleaved1F1B", 1, 1, [2, 3, 2, 1]),
        (2, 4, "GPipe", 1, 1, [0, 1, 1, 0]),
        (1, 4, "GPipe", 1, 1, []),
    ],
)
def test_layers_are_dealt_out_as_torchtitan_does(
    n_layers: int, degree: int, schedule: str, first: int, last: int, dealt: list[int]
) -> None:
    pipeline = {"degree": degree, "schedule": schedule, "first_less": first, "last_less": last}
    assert layers_of_stages(run(pipeline=pipeline, n_layers=n_layers)) == dealt


def test_what_is_not_known_is_not_judged() -> None:
    unknown = run(pipeline={"degree": 2, "microbatch_size": 3}, n_layers=None, local_batch_size=None)
    assert find_problems(unknown) == ()
    assert stages(replace(unknown, pipeline=replace(unknown.pipeline, layers_per_stage=2))) is None
    from_file = Pipeline(2, "PipelineScheduleMulti", from_file=True)
    assert find_problems(replace(unknown, pipeline=from_file)) == ()


def test_every_schedule_can_be_built_with_what_its_rule_asks_for() -> None:
    for name, schedule in SCHEDULES.items():
        least = 2 * schedule.default_stages
        assert find_problems(run(pipeline={"degree": 2, "schedule": name}, local_batch_size=least)) == ()


ONE = """\
This run cannot work: local_batch_size (3) / pipeline_parallel_microbatch_size (1) = 3 microbatches are \
fewer than the 4 stages, and 1F1B wants one for each.

  PP005 local_batch_size (3) / pipeline_parallel_microbatch_size (1) = 3 microbatches are fewer than
        the 4 stages, and 1F1B wants one for each:
        the schedule gets as many microbatches as it needs: at least one for every stage (1F1B,
        DualPipeV), or a multiple of its rounds (Interleaved1F1B, InterleavedZeroBubble).

Without this check: torch stops with a ValueError as the schedule is built, when the process groups are
  up and the weights are laid out.
To change it: set training.local_batch_size to 4 or more, or parallelism.pipeline_parallel_schedule to
  GPipe."""

TWO = """\
This run cannot work: data_parallel_shard_degree (2) x tensor_parallel_degree (2) = 4 is not the number of \
ranks (16) (and 1 more).

  MESH001 data_parallel_shard_degree (2) x tensor_parallel_degree (2) = 4 is not the number of ranks
        (16):
        the product of the replicate, shard, context, tensor and pipeline parallel degrees is the
        number of ranks.
  BATCH001 global_batch_size (24) is not a multiple of local_batch_size (8) x 2 data parallel ranks =
        16:
        training.global_batch_size is a multiple of the local batch size times the data parallel
        degrees (main: num_tokens_per_train_step of all tokens of a microbatch, times their number).

Without this check (MESH001): every rank stops with an AssertionError, when the process groups are up
  and no sooner.
Without this check (BATCH001): every rank stops with an AssertionError (main: a ValueError), when the
  process groups are up.
To change it (MESH001): set data_parallel_shard_degree to 8.
To change it (BATCH001): set training.global_batch_size to 16, or to -1."""

IN_TOKENS = """\
This run cannot work: num_pp_microbatches = 1 microbatches are fewer than the 2 stages, and 1F1B wants one \
for each (and 1 more).

  PP005 num_pp_microbatches = 1 microbatches are fewer than the 2 stages, and 1F1B wants one for each:
        the schedule gets as many microbatches as it needs: at least one for every stage (1F1B,
        DualPipeV), or a multiple of its rounds (Interleaved1F1B, InterleavedZeroBubble).
  BATCH001 tokens_in_a_step (96) is not a multiple of tokens_at_a_time (64) x num_pp_microbatches (1) x
        1 data parallel ranks = 64:
        training.global_batch_size is a multiple of the local batch size times the data parallel
        degrees (main: num_tokens_per_train_step of all tokens of a microbatch, times their number).

Without this check (PP005): torch stops with a ValueError as the schedule is built, when the process
  groups are up and the weights are laid out.
Without this check (BATCH001): every rank stops with an AssertionError (main: a ValueError), when the
  process groups are up.
To change it (PP005): set parallelism.num_pp_microbatches to 2 or more, or
  parallelism.pipeline_parallel_schedule to GPipe.
To change it (BATCH001): set training.tokens_in_a_step to 64, or to -1."""


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (run(pipeline={"degree": 4}, local_batch_size=3), ONE),
        (in_tokens(microbatches=1, global_batch_size=96), IN_TOKENS),
        (run(dp_shard=2, tp=2, world_size=16, global_batch_size=24), TWO),
    ],
)
def test_the_text_says_everything_at_once(broken: Run, text: str) -> None:
    error = run_error(None, broken.degrees, find_problems(broken))
    assert str(error) == text
    assert isinstance(error, RunError)
    assert not isinstance(error, TPCompatError)


def test_a_degree_that_does_not_fit_is_told_first_and_the_run_beside_it() -> None:
    dim = ShardedDim("TP002", 2, (0,), Otherwise("dies", "it dies."))
    plan = Plan("Tiny", (dim,), 1, ("--tp {degree}",))
    broken = run(tp=4, world_size=3)
    error = run_error(plan, broken.degrees, find_problems(broken))
    assert isinstance(error, TPCompatError)
    first, _, rest = str(error).partition("\n\nBeside that, of the run as a whole:\n\n")
    assert first.startswith("Tensor parallel degree (4) must divide n_kv_heads (2).")
    assert rest.startswith("  MESH001 tensor_parallel_degree (4) is not the number of ranks (3):")
    assert [problem.code for problem in error.problems] == ["MESH001"]
    assert [violation.code for violation in error.violations] == ["TP002"]


def test_what_only_warns_keeps_nobody_from_running() -> None:
    crossing = run(tp=16, gpus_per_node=8)
    problems = find_problems(crossing)
    assert problems == (
        Problem(
            "NODE001",
            "tensor_parallel_degree (16) does not divide the 8 GPUs of a node",
            "the ranks of a tensor or expert parallel group are on one node",
            "every layer waits for the network between nodes, several times in each step.",
            "take degrees whose product divides the number of GPUs of a node",
            warns=True,
        ),
    )
    assert run_error(None, crossing.degrees, problems) is None


def test_an_error_survives_the_way_between_processes() -> None:
    import pickle

    error = run_error(None, Degrees(tp=1), find_problems(run(global_batch_size=0)))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.problems) == (str(error), error.problems if error else ())


@pytest.mark.parametrize("rule", [RUN_RULES["PP010"], RUN_RULES["PP011"], FAULTS["NUM015"]])
def test_the_schedules_that_are_named_are_those_that_split_the_backward_pass(rule: RunRule) -> None:
    named = {name for name in SCHEDULES if name in rule.must}
    assert named == {name for name, schedule in SCHEDULES.items() if schedule.splits_backward}
