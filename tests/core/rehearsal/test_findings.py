"""What the records of the ranks say of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from torchtitan_tp_validate.rehearsal.findings import Rehearsal, judged

REFERENCE = {
    **{"losses": [4.0, 3.0], "norms": [1.0, 0.5], "validations": [3.5]},
    **{"trainable": ["w1", "w2"], "uninitialized": []},
}


def record(**changes: Any) -> dict[str, Any]:
    gradients = [[seen("w1"), seen("w2")], [seen("w1"), seen("w2")]]
    return {
        **REFERENCE,
        "gradients": gradients,
        "drift": [],
        "states": [],
        "first_step": 1,
        "outputs": {},
        "stand_ins": ["flex attention"],
        **changes,
    }


def seen(name: str, factor: float = 1.0, rest: float = 1e-7) -> dict[str, Any]:
    distance = math.hypot(factor - 1, rest)
    return {"name": name, "distance": distance, "factor": factor, "rest": rest, "layout": "Replicate()"}


def rehearsal(
    *records: dict[str, Any],
    ends: tuple[str, ...] = ("ended",),
    uninitialized: tuple[str, ...] = (),
    resumed: bool = False,
    **degrees: int,
) -> Rehearsal:
    told = [
        {"rank": rank, "how": how, "stage": "forward", "error": "", "traceback": ""}
        for rank, how in enumerate(ends)
    ]
    run = {
        "local_batch_size": 2,
        "resumed": resumed,
        "labels": 64,
        "records": records,
        "reference": {**REFERENCE, "uninitialized": uninitialized},
        "ends": told,
    }
    return judged(
        {
            "release": "0.2.2",
            "model": "tiny",
            "verdict": "fits",
            "degrees": {"tp": 4, "ep": 1, **degrees},
            "microbatches": 3,
            "cuts": [],
            "left_out": ["Float8Linear in fp32"],
            "runs": [run],
        }
    )


def test_a_run_that_computes_the_same_is_equal() -> None:
    seen = rehearsal(record(), record())
    assert (seen.outcome, seen.compared, seen.differences) == ("equal", 4, ())
    assert seen.worst == pytest.approx(1e-7)
    assert (seen.degrees, seen.stand_ins) == ({"tp": 4}, ("Float8Linear in fp32", "flex attention"))


@pytest.mark.parametrize(
    ("factor", "rest", "looks_like"),
    [
        (4.0, 1e-6, "counted once per TP rank"),
        (3.9, 0.1, "counted once per TP rank"),
        (0.25, 1e-6, "not summed over TP ranks"),
        (2.0, 1e-6, "counted once per EP rank"),
        (0.5, 1e-6, "not summed over EP ranks"),
        (0.0, 0.0, "zero"),
        (3.0, 1e-6, "counted once per microbatch"),
        (64.0, 1e-3, "counted once per token of a step"),
        (5.0, 1e-6, ""),
        (4.0, 0.7, ""),
        (math.nan, math.inf, ""),
    ],
)
def test_a_wrong_gradient_says_what_it_looks_like(factor: float, rest: float, looks_like: str) -> None:
    wrong = record(gradients=[[seen("w1"), seen("w2", factor, rest)]])
    result = rehearsal(record(), wrong, ep=2, dp_shard=2)
    assert result.outcome == "differs"
    (difference,) = result.differences
    assert (difference.what, difference.name, difference.step) == ("gradient", "w2", 1)
    assert difference.looks_like == looks_like


def test_only_what_most_gradients_have_in_common_is_blamed_on_data_ranks() -> None:
    wrong = record(gradients=[[seen("w1", 0.5), seen("w2", 0.5)]])
    looks_like = {one.looks_like for one in rehearsal(wrong, ep=2, dp_shard=2, dp_replicate=2).differences}
    assert looks_like == {"not summed over EP or data shard or data replica ranks"}


def test_the_cause_comes_before_its_consequences() -> None:
    wrong = record(
        losses=[4.0, 3.1],
        gradients=[[seen("w1", 1.0, 0.3), seen("w2", 4.0, 0.05)], [seen("w1", 9.0), seen("w2", 4.0)]],
        drift=["w1"],
    )
    found = [(d.what, d.name, d.step) for d in rehearsal(wrong).differences]
    assert found == [
        ("gradient", "w2", 1),
        ("gradient", "w1", 1),
        ("gradient", "w2", 2),
        ("gradient", "w1", 2),
        ("copies", "w1", 2),
        ("loss", "", 2),
    ]


@pytest.mark.parametrize(
    ("outputs", "first"),
    [
        ({}, ""),
        ({"embed": 1e-7, "layers.0.mlp.w1": 1e-7, "layers.0.mlp": 0.2, "layers.0": 0.1}, "layers.0.mlp"),
        # A part of a sum that the module around it puts together.
        ({"layers.0.mlp.w2": 0.9, "layers.0.mlp": 1e-7, "layers.0": 1e-7}, ""),
        # What a module that cannot be compared stands around.
        ({"layers.0.moe.experts": 0.9, "layers.0": 0.1}, "layers.0.moe.experts"),
        ({"head": math.nan}, "head"),
    ],
)
def test_the_first_wrong_output_is_named(outputs: dict[str, float], first: str) -> None:
    assert rehearsal(record(outputs=outputs)).output == first


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"losses": [4.0, 3.1]}, "loss"),
        ({"norms": [2.0, 0.5]}, "gradient norm"),
        ({"validations": [7.0]}, "validation loss"),
        ({"drift": ["w1"]}, "copies"),
        ({"trainable": ["w1", "w2", "w3"]}, "trainable"),
        ({"trainable": ["w1"]}, "trainable"),
    ],
)
def test_whatever_differs_is_found(changes: dict[str, Any], what: str) -> None:
    result = rehearsal(record(**changes))
    assert (result.outcome, [difference.what for difference in result.differences]) == ("differs", [what])


def test_a_run_that_has_resumed_is_compared_from_its_first_step() -> None:
    resumption = {
        "losses": [3.0],
        "norms": [0.5],
        "validations": [],
        "gradients": [[seen("w1")]],
        "first_step": 2,
    }
    equal = rehearsal(record(**resumption), resumed=True)
    assert (equal.outcome, equal.resumed, equal.local_batch_sizes) == ("equal", True, ())
    wrong = record(**resumption | {"losses": [4.0]}, states=[seen("w1: exp_avg", 0.9)], drift=["w2"])
    found = [(one.what, one.name, one.step) for one in rehearsal(wrong, resumed=True).differences]
    assert found == [("copies", "w2", 2), ("loss", "", 2), ("optimizer state", "w1: exp_avg", 2)]


def test_what_nobody_initializes_is_told_first() -> None:
    result = rehearsal(record(gradients=[[seen("w2", 4.0)]]), uninitialized=("rotary_emb.inv_freq",))
    found = [(difference.what, difference.name) for difference in result.differences]
    assert found == [("uninitialized", "rotary_emb.inv_freq"), ("gradient", "w2")]


def test_a_rank_without_the_last_stage_of_a_pipeline_has_no_loss_to_compare() -> None:
    assert rehearsal(record(losses=[None, None], validations=[None]), record()).outcome == "equal"


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [
        (("raised", "waited"), "dies"),
        (("ended", "killed"), "dies"),
        (("hung", "hung"), "hangs"),
    ],
)
def test_ranks_that_do_not_end_are_told(ends: tuple[str, ...], outcome: str) -> None:
    result = rehearsal(ends=ends)
    assert result.outcome == outcome
    assert [end["how"] for end in result.ends] == [how for how in ends if how != "ended"]


@pytest.mark.parametrize(
    ("name", "factor", "issue"),
    [
        ("layers.0.moe.router.gate.weight", 0.7, "#1805"),
        ("layers.0.moe.router.gate.weight", 1.0, ""),
        ("norm.weight", 64.0, "#2972"),
        ("norm.weight", 0.7, ""),
    ],
)
def test_a_known_upstream_fault_is_named(name: str, factor: float, issue: str) -> None:
    result = rehearsal(record(gradients=[[seen(name, factor)]]))
    assert [issue in difference.issue for difference in result.differences] == [True] * (factor != 1.0)
    assert bool(issue) == any(difference.issue for difference in result.differences)
