"""Each known fault: a layout that shows it, and those a step away that do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.core.test_layout import BUBBLE, DTENSOR, OLD, SPMD, run
from torchtitan_tp_validate.faults import find_faults, not_judged
from torchtitan_tp_validate.layout import Run, Sizes
from torchtitan_tp_validate.rules import FAULTS, Line
from torchtitan_tp_validate.validate import run_error

TWO_STAGES = {"degree": 2}
ONE = {"degree": 2, "microbatch_size": 1}
TWO = {"degree": 2, "microbatch_size": 2}
FOUR_STAGES = {"schedule": "Interleaved1F1B"}

CASES: dict[str, tuple[Run, list[Run]]] = {
    "NUM001": (
        run(OLD, tp=2),
        [run(OLD, tp=1), run(OLD, tp=2, ep=2, dp_shard=2), run(OLD, ep=2, dp_shard=2), run(OLD, dp_shard=2)],
    ),
    "NUM002": (
        run(OLD, tp=2, ep=2, dp_shard=2),
        [run(OLD, tp=2, ep=2, etp=2, dp_shard=2), run(OLD, ep=2, dp_shard=2), run(OLD, tp=2)],
    ),
    "NUM003": (
        run(OLD, tp=2, ep=2, etp=2, dp_shard=2),
        [run(OLD, tp=2, ep=2, dp_shard=2), run(OLD, tp=2), run(OLD, ep=2, dp_shard=2)],
    ),
    "NUM004": (run(tp=2), [run(tp=2, ep=2), run(dp_shard=2), run(DTENSOR, tp=2)]),
    "NUM005": (run(DTENSOR, tp=2), [run(DTENSOR, dp_shard=2), run(SPMD, tp=2)]),
    "NUM006": (
        run(DTENSOR, tp=2, local_batch_size=1, has_experts=True),
        [
            run(DTENSOR, tp=2, local_batch_size=2, has_experts=True),
            run(DTENSOR, tp=2, ep=2, local_batch_size=1, has_experts=True),
            run(DTENSOR, tp=2, local_batch_size=1),
            run(DTENSOR, tp=2, local_batch_size=1, has_experts=True, sequence_parallel=False),
            run(DTENSOR, cp=2, local_batch_size=1),
            run(DTENSOR, TWO, tp=2, local_batch_size=2, has_experts=True),
            run(SPMD, tp=2, local_batch_size=1, has_experts=True),
            run(DTENSOR, tp=2, local_batch_size=None, has_experts=True),
        ],
    ),
    "NUM007": (run(), [run(DTENSOR)]),
    "NUM008": (run(OLD, TWO_STAGES), [run(OLD, tp=2), run(SPMD, TWO_STAGES)]),
    "NUM009": (
        run(OLD, dp_replicate=2),
        [run(OLD, dp_replicate=2, dp_shard=2), run(OLD, dp_replicate=2, cp=2), run(SPMD, dp_replicate=2)],
    ),
    "NUM010": (run(OLD), [run(SPMD)]),
    "NUM011": (run(), [run(OLD)]),
    "NUM014": (
        run(pipeline=TWO, tp=2, changes_embedding=True),
        [
            run(pipeline=TWO, tp=2),
            run(pipeline=ONE, tp=2, changes_embedding=True),
            run(pipeline=ONE | FOUR_STAGES, tp=2),
            run(pipeline=TWO | FOUR_STAGES),
            run(tp=2, changes_embedding=True),
            run(pipeline=TWO | FOUR_STAGES, tp=2, sequence_parallel=False),
            run(DTENSOR, TWO | FOUR_STAGES, tp=2, changes_embedding=True),
            run(OLD, TWO | FOUR_STAGES, tp=2),
            run(pipeline=TWO | FOUR_STAGES, tp=2, local_batch_size=64, sizes=Sizes(in_a_row=True)),
        ],
    ),
}
CASES["NUM015"] = (
    run(pipeline=BUBBLE, shards_before_backward=True),
    [
        run(pipeline=BUBBLE),
        run(pipeline={**BUBBLE, "schedule": "Interleaved1F1B"}, shards_before_backward=True),
        run(shards_before_backward=True),
        run(OLD, BUBBLE, shards_before_backward=True),
    ],
)
CASES["NUM016"] = (
    run(OLD, dp_replicate=2),
    [run(OLD, tp=2), run(OLD, dp_shard=2), run(OLD, cp=2), run(OLD, dp_shard_is_known=False), run(SPMD)],
)
CASES["CKPT005"] = (run(has_experts=True), [run()])
CASES["CKPT006"] = (run(), [run(OLD)])
CASES["CKPT001"] = (
    run(dp_shard=4, permuted_heads=2),
    [
        run(dp_shard=4, permuted_heads=4),
        run(dp_shard=2, permuted_heads=2),
        run(dp_shard=4),
        run(dp_shard=4, dp_replicate=2, permuted_heads=4),
        run(tp=2, dp_shard=2, permuted_heads=4),
        run(dp_replicate=4, permuted_heads=2),
        run(OLD, dp_shard=2, tp=2, permuted_heads=8),
        run(DTENSOR, cp=4, permuted_heads=8),
        run(pipeline=TWO_STAGES, dp_shard=2, permuted_heads=2),
        run(dp_shard=1, permuted_heads=1),
    ],
)
MORE = {
    "CKPT001": [
        run(OLD, dp_shard=2, tp=2, permuted_heads=2),
        run(DTENSOR, cp=4, permuted_heads=2),
        run(dp_shard=16, permuted_heads=8),
        run(tp=4, permuted_heads=2),
    ],
    "NUM001": [run(OLD, tp=2, ep=2, etp=2, dp_shard=2)],
    "NUM016": [run(OLD)],
    "NUM014": [
        run(pipeline=TWO | FOUR_STAGES, tp=2),
        run(pipeline=TWO | {"degree": 3}, tp=2),
        run(pipeline=TWO | {"parts": (("tok_embeddings",), ("layers.0",), ("lm_head",))}, tp=2),
        run(pipeline=TWO | {"from_file": True}, tp=2),
    ],
    "NUM006": [
        run(DTENSOR, ONE, tp=2, local_batch_size=4, has_experts=True),
        run(DTENSOR, cp=2, local_batch_size=1, full_dtensor=True),
        run(DTENSOR, tp=2, local_batch_size=64, has_experts=True, sizes=Sizes(in_a_row=True)),
    ],
}
"""Other layouts that show a fault."""


def suffering(one: Run, *codes: str) -> Run:
    return replace(one, faults=frozenset(codes))


@pytest.mark.parametrize("code", FAULTS)
def test_a_fault_is_found_where_it_shows_and_a_step_away_it_is_not(code: str) -> None:
    shows, others = CASES[code]
    for one in (shows, *MORE.get(code, ())):
        assert [problem.code for problem in find_faults(suffering(one, code))] == [code], one
    for one in others:
        assert find_faults(suffering(one, code)) == (), one


def test_a_torchtitan_that_has_mended_it_is_not_accused() -> None:
    for shows, _ in CASES.values():
        assert find_faults(shows) == ()


REFUSALS = Path(__file__).with_name("refusals_of_faults.txt")
"""What is said of the first layout of each of `CASES`: ``python -m tests.core.test_faults`` writes it."""


def refusals() -> str:
    """Return the full text of the refusal of each fault."""
    errors = (run_error(None, run().degrees, find_faults(suffering(CASES[code][0], code))) for code in FAULTS)
    return "\n\n\n".join(map(str, errors)) + "\n"


def test_the_refusals_are_word_for_word_those_that_were_read() -> None:
    assert refusals() == REFUSALS.read_text(encoding="utf-8")


SPLIT_HEADS = """\
This run cannot work: Hugging Face weights of 8 key-value heads are split over 16 ranks.

  CKPT001 Hugging Face weights of 8 key-value heads are split over 16 ranks:
        where Hugging Face weights of Llama 3 are loaded or saved, n_kv_heads is a multiple of
        data_parallel_shard_degree x context_parallel_degree x tensor_parallel_degree.

Without this check: the adapter permutes the rows of each head, and stops with
  "Cannot unflatten unevenly sharded tensor" or "Sharding propagation failed": before the first step
  (initial_load_in_hf), or as the weights are saved after the last (last_save_in_hf).
To change it: repair it (--repair), move ranks from data_parallel_shard_degree to
  data_parallel_replicate_degree, or convert the weights by torchtitan's scripts/checkpoint_conversion
  before or after the run."""


def test_heads_of_hugging_face_weights_are_counted_with_the_ranks() -> None:
    split = suffering(run(dp_shard=16, permuted_heads=8), "CKPT001")
    assert str(run_error(None, run().degrees, find_faults(split))) == SPLIT_HEADS


def test_heads_are_not_counted_with_ranks_that_are_not_known() -> None:
    said = (
        "CKPT001: data_parallel_shard_degree is left to the number of ranks, which is not known before the "
        "run starts",
    )
    left = suffering(run(dp_shard_is_known=False, permuted_heads=8), "CKPT001")
    assert not_judged(left) == said
    assert not_judged(suffering(run(dp_shard=16, permuted_heads=8), "CKPT001")) == ()
    assert not_judged(suffering(run(dp_shard_is_known=False), "CKPT001")) == ()
    assert not_judged(run(dp_shard_is_known=False, permuted_heads=8)) == ()
    # What is known is enough to refuse it.
    assert not_judged(suffering(run(dp_shard_is_known=False, tp=16, permuted_heads=8), "CKPT001")) == ()


def test_every_fault_says_how_to_go_on_and_what_is_no_matter_of_checkpoints_trains_wrong() -> None:
    for code, rule in FAULTS.items():
        assert all(otherwise.silent is (not code.startswith("CKPT")) for otherwise in rule.otherwise.values())
        assert rule.instead.startswith("repair it (--repair)") is rule.can_be_repaired
        assert not rule.warns


def test_what_is_told_names_every_degree() -> None:
    several: dict[str, Any] = {"tp": 2, "cp": 2, "ep": 2, "dp_shard": 2, "dp_replicate": 2}
    (problem,) = find_faults(suffering(run(Line.TORCHTITAN_0_2, TWO_STAGES, **several), "NUM008"))
    assert problem.text == (
        "the installed torchtitan trains this model wrong at tensor_parallel_degree 2, "
        "expert_parallel_degree 2, context_parallel_degree 2, data_parallel_replicate_degree 2, "
        "data_parallel_shard_degree 2, pipeline_parallel_degree 2"
    )


if __name__ == "__main__":
    REFUSALS.write_text(refusals(), encoding="utf-8")
