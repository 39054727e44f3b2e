from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from tests.core.offers import accepts, contradictions
from tests.core.shapes import (
    args_of,
    attention_layer,
    config_tree,
    delta_layer,
    model_args,
    model_with_experts,
)
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.plan import Plan, ShardedDim, Split
from torchtitan_tp_validate.rules import Otherwise
from torchtitan_tp_validate.validate import compat_error, judge, raise_if_incompatible

DIES = Otherwise("dies", "it dies.")


@pytest.mark.parametrize(
    ("heads", "kv", "tp", "works"),
    [
        (8, 2, 2, True),
        (8, 2, 4, False),
        (8, 2, 8, False),
        (12, 6, 4, False),  # more KV heads than ranks, and still uneven
        (6, 6, 3, True),
        (10, 4, 4, False),  # the query heads alone do not fit
        (8, None, 8, True),
        (8, None, 3, False),
    ],
)
def test_a_degree_works_when_it_divides_both_head_counts(
    heads: int, kv: int | None, tp: int, works: bool
) -> None:
    for model in (model_args(heads, kv), config_tree(attention_layer(heads, kv))):
        assert (tp in tpv.valid_tp_degrees(model)) is works
        if works:
            tpv.validate_tp_compat(model, tp)
        else:
            with pytest.raises(tpv.TPCompatError):
                tpv.validate_tp_compat(model, tp)


def test_parallel_dims_and_int_mean_the_same() -> None:
    tpv.validate_tp_compat(model_args(), SimpleNamespace(tp=2))
    with pytest.raises(tpv.TPCompatError, match=re.escape("Tensor parallel degree (4)")):
        tpv.validate_tp_compat(model_args(), SimpleNamespace(tp=4))


def test_a_later_layer_alone_is_refused_and_named() -> None:
    model = config_tree(attention_layer(8, 4), attention_layer(8, 2), attention_layer(8, 4))
    with pytest.raises(tpv.TPCompatError, match=re.escape("in layer 1 (1 of 3)")) as caught:
        tpv.validate_tp_compat(model, 4)
    assert caught.value.violations[0].layers == (1,)


@pytest.mark.parametrize("model", [None, ..., model_args("x"), config_tree()], ids=repr)
def test_tp_of_one_is_accepted_whatever_the_model(model: Any) -> None:
    tpv.validate_tp_compat(model, 1)
    tpv.validate_tp_compat(model, SimpleNamespace(tp=1))


@pytest.mark.parametrize("tp", [0, -1, -8, True, False, 2.0, 2.5, "4", None, [2], float("nan")], ids=repr)
def test_a_degree_that_is_no_positive_int_is_named(tp: Any) -> None:
    got = f"{tp!r} of type {type(tp).__name__}"
    text = f"Tensor parallel degree must be a whole number of at least 1, got {got}."
    with pytest.raises(tpv.TPDegreeError, match=re.escape(text)):
        tpv.validate_tp_compat(model_args(), tp)
    with pytest.raises(tpv.TPDegreeError, match=re.escape(f"{got} (from Simple")):
        tpv.validate_tp_compat(model_args(), SimpleNamespace(tp=tp))


def test_any_integer_type_is_a_degree() -> None:
    class Index:
        def __index__(self) -> int:
            return 4

    with pytest.raises(tpv.TPCompatError, match=re.escape("(4) must divide n_kv_heads (2)")):
        tpv.validate_tp_compat(model_args(), Index())


@pytest.mark.parametrize("model", [None, 7, "llama3", {}, ..., SimpleNamespace(dim=4)], ids=repr)
def test_an_object_without_head_counts_is_never_compatible(model: Any) -> None:
    text = (
        f"Not validated: cannot find head counts in {model!r} of type {type(model).__module__}."
        f"{type(model).__qualname__}. Expected a torchtitan model, its config (0.3.x: with .layers) or its "
        "model args (0.2.x: with .n_heads), or a Hugging Face model or config (with num_attention_heads)."
    )
    with pytest.raises(tpv.PlanError, match=f"^{re.escape(text)}$"):
        tpv.validate_tp_compat(model, 2)
    with pytest.raises(tpv.PlanError, match=f"^{re.escape(text)}$"):
        tpv.valid_tp_degrees(model)


@pytest.mark.parametrize("value", [0, -2, True, 2.0, "8", [8]], ids=repr)
@pytest.mark.parametrize("field", ["n_heads", "n_kv_heads", "n_layers"])
def test_a_head_count_that_is_no_positive_int_is_named(field: str, value: Any) -> None:
    args = model_args(**{field: value})
    message = re.escape(
        f"Not validated: SimpleNamespace.{field} must be a positive whole number, got {value!r}."
    )
    with pytest.raises(tpv.PlanError, match=message):
        tpv.validate_tp_compat(args, 2)


def test_a_plan_of_no_layers_is_never_compatible() -> None:
    for seq_len in (None, 32):
        with pytest.raises(tpv.PlanError) as caught:
            tpv.validate_tp_compat(config_tree(), 2, seq_len=seq_len)
        assert str(caught.value) == (
            "Not validated: SimpleNamespace has 0 layers, so there is nothing to judge."
        )


def test_an_unreadable_layer_is_never_compatible_but_a_violation_beside_it_is_found() -> None:
    unknown = SimpleNamespace(attention=None, mixer="mamba")
    half_read = config_tree(attention_layer(8, 4), unknown)
    with pytest.raises(tpv.PlanError, match=re.escape("has 2 layers, and 1 of them has no attention or")):
        tpv.validate_tp_compat(half_read, 4)
    with pytest.raises(tpv.PlanError, match=re.escape("layers[1]")):
        tpv.valid_tp_degrees(half_read)
    with pytest.raises(tpv.TPCompatError):
        tpv.validate_tp_compat(half_read, 8)


@pytest.mark.parametrize(
    ("unread", "text"),
    [
        (("a", "b", "c"), "3 of them have no attention or delta_net config with head counts: a, b, c."),
        (
            ("a", "b", "c", "d"),
            "4 of them have no attention or delta_net config with head counts: a, b, c, ....",
        ),
    ],
)
def test_unreadable_layers_are_counted_and_the_first_three_named(unread: tuple[str, ...], text: str) -> None:
    with pytest.raises(tpv.PlanError) as caught:
        raise_if_incompatible(Plan("Tiny", (), 9, "", unread=unread), Degrees(tp=2))
    assert str(caught.value) == f"Not validated: Tiny has 9 layers, and {text}"


def test_shared_key_value_heads_and_the_sequence_count_where_they_are_given() -> None:
    model = args_of("llama3", head_dim=4)
    assert tpv.valid_tp_degrees(model) == [1, 2]
    assert tpv.valid_tp_degrees(model, replicate_kv_heads=True) == [1, 2, 4, 8]
    tpv.validate_tp_compat(model, 4, replicate_kv_heads=True)
    assert tpv.valid_tp_degrees(model_args(8, 8), seq_len=12) == [1, 2]


def test_a_run_that_fits_is_answered_with_the_plan_at_its_degrees() -> None:
    degrees = Degrees(tp=2, seq_len=64)
    plan = judge(model_args(8, 8), degrees)
    assert plan is not None
    assert plan.degrees == degrees
    assert not [text for text in plan.not_judged if "TP009" in text]


def test_nothing_is_said_of_key_value_heads_where_another_dimension_is_at_fault() -> None:
    model = args_of("qwen3", head_dim=4, moe_args=SimpleNamespace(num_experts=6))
    with pytest.raises(tpv.TPCompatError) as caught:
        judge(model, Degrees(tp=2, ep=4, dp_shard=2))
    assert caught.value.replication_degrees == []
    assert caught.value.headline == (
        "Expert parallel degree (4) must divide num_experts (6). For Qwen3-MoE, max supported EP is 2."
    )


def test_a_refusal_is_told_as_data_of_the_requested_degrees() -> None:
    otherwise = Otherwise("silently wrong", "it trains on.", silent=True)
    rows, heads = ShardedDim("TP005", 12, (0,), otherwise), ShardedDim("TP002", 2, (0,), DIES)
    plan = Plan("Tiny", (rows, heads), 1, "", shared_kv=(replace(heads, split=Split.SHARED),))
    error = compat_error(plan, Degrees(tp=8, replicate_kv_heads=True))
    assert error is not None
    (violation,) = error.violations
    assert (violation.degree, violation.silent) == (8, True)
    assert error.valid_degrees == [1, 2, 4, 6, 12]


def test_gated_delta_heads_count_too() -> None:
    model = config_tree(delta_layer(2, 8), attention_layer(8, 8))
    assert tpv.valid_tp_degrees(model) == [1, 2]
    with pytest.raises(tpv.TPCompatError, match=re.escape("must divide n_key_heads (2)")) as caught:
        tpv.validate_tp_compat(model, 4)
    assert [v.code for v in caught.value.violations] == ["TP003"]
    with pytest.raises(tpv.TPCompatError, match=re.escape("must divide n_value_heads (6)")) as caught:
        tpv.validate_tp_compat(config_tree(delta_layer(4, 6)), 4)
    assert [v.code for v in caught.value.violations] == ["TP004"]


def test_model_name_overrides_the_derived_name() -> None:
    with pytest.raises(tpv.TPCompatError, match="For My-Model, max supported TP is 2"):
        tpv.validate_tp_compat(model_args(), 4, model_name="My-Model")


@pytest.mark.parametrize(
    ("tp", "cp", "seq_len", "works"),
    [
        (2, 1, 32, True),
        (2, 1, 34, False),
        (4, 1, 32, True),
        (2, 2, 32, True),
        (4, 2, 24, False),
        (1, 1, 33, True),
    ],
)
def test_0_2_splits_the_sequence_in_twice_tp_times_cp(tp: int, cp: int, seq_len: int, works: bool) -> None:
    parallel_dims = SimpleNamespace(tp=tp, cp=cp)
    if works:
        tpv.validate_tp_compat(model_args(8, 4), parallel_dims, seq_len=seq_len)
        return
    with pytest.raises(tpv.TPCompatError, match=rf"\({tp}\) does not fit seq_len \({seq_len}\)") as caught:
        tpv.validate_tp_compat(model_args(8, 4), parallel_dims, seq_len=seq_len)
    assert [v.code for v in caught.value.violations] == ["TP009"]
    assert f"seq_len = {seq_len} is not a multiple of {2 * tp * cp}, in training.seq_len:" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("tp", "more", "seq_len", "works"),
    [
        (2, {}, 34, True),
        (4, {}, 34, False),
        (4, {"cp": 2}, 40, False),
        (4, {"spmd_backend": "partial_dtensor"}, 34, True),
        (4, {"sequence_parallel": False}, 34, True),
        (4, {"sequence_parallel": False, "ep": 2}, 34, False),
    ],
)
def test_0_3_splits_the_sequence_if_it_runs_sequence_parallel_or_has_experts(
    tp: int, more: dict[str, Any], seq_len: int, works: bool
) -> None:
    degrees = Degrees(tp=tp, seq_len=seq_len, **more)
    model = config_tree(attention_layer(8, 4))
    if works:
        judge(model, degrees)
    else:
        with pytest.raises(tpv.TPCompatError, match=r"seq_len \(34|40\)"):
            judge(model, degrees)


def test_0_2_sizes_of_a_built_model() -> None:
    def linear(size: int) -> Any:
        return SimpleNamespace(w1=SimpleNamespace(out_features=size))

    def experts(**shapes: tuple[int, ...]) -> Any:
        weights = {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}
        return SimpleNamespace(_parameters=weights)

    def layer(**parts: Any) -> Any:
        return SimpleNamespace(attention=None, **parts)

    def codes(tp: int, ep: int = 1, etp: int = 1, **parts: Any) -> list[str]:
        args = model_args(8, 8, n_layers=1, vocab_size=257, moe_args=SimpleNamespace(num_experts=6))
        model = SimpleNamespace(model_args=args, layers={"0": layer(**parts)})
        try:
            tpv.validate_tp_compat(model, SimpleNamespace(tp=tp, ep=ep, etp=etp))
        except tpv.TPCompatError as error:
            return [violation.code for violation in error.violations]
        return []

    assert codes(2, feed_forward=linear(64)) == []
    assert codes(2, feed_forward=linear(65)) == ["TP005"]
    odd = experts(w1=(6, 63, 32), w2=(6, 32, 63), w3=(6, 63, 32))
    assert codes(2, moe=SimpleNamespace(shared_experts=linear(65), experts=odd)) == ["TP010"]
    fused = SimpleNamespace(shared_experts=None, experts=experts(mlp1_weight=(6, 14, 32)))  # hidden size 7
    assert codes(2, moe=fused) == ["TP011"]
    assert codes(4, moe=fused) == []  # 2+2+2+1, 4+4+4+2
    assert codes(2, ep=2, moe=fused) == []
    assert codes(2, ep=2, etp=2, moe=fused) == ["TP011"]
    assert codes(2, ep=4) == ["EP001"]
    assert codes(2, ep=3) == []


def test_0_2_takes_an_uneven_vocabulary_until_a_shard_is_empty() -> None:
    tpv.validate_tp_compat(model_args(8, 8, vocab_size=255), 4)
    with pytest.raises(tpv.TPCompatError, match=r"degree \(4\) does not fit vocab_size \(9\)"):
        tpv.validate_tp_compat(model_args(8, 8, vocab_size=9), 4)


CHANGING = [
    Degrees(tp=2, ep=ep, etp=etp, dp_shard=dp_shard, cp=cp)
    for ep, etp in ((1, 1), (2, 1), (2, 2), (3, 1))
    for dp_shard, cp in ((1, 1), (6, 1), (4, 2), (16, 1))
]


@pytest.mark.parametrize(
    "model",
    [
        model_args(),
        model_args(12, 6, vocab_size=9, moe_args=SimpleNamespace(num_experts=6)),
        config_tree(delta_layer(6, 12), attention_layer(24, 12)),
        config_tree(attention_layer(24, 12), SimpleNamespace(attention=None, mixer="mamba")),
        model_with_experts(36),
        model_with_experts(34),
        model_with_experts(48, grouped=True),
        model_with_experts(28, fused=True, n_heads=16, n_kv_heads=16),
        model_with_experts(64, n_heads=32, n_kv_heads=32, moe_args=SimpleNamespace(num_experts=4)),
        {"model_type": "llama", "num_attention_heads": 24, "num_key_value_heads": 12, "num_hidden_layers": 3},
    ],
    ids=repr,
)
def test_what_is_offered_is_what_is_accepted(model: Any) -> None:
    found = []
    for degrees in CHANGING:
        try:
            found += contradictions(model, degrees, 34, (3, 4, 16))
        except tpv.PlanError:
            assert not any(accepts(model, replace(degrees, tp=tp)) for tp in (2, 3, 4, 8))
    assert not found, "\n".join(found[:20])


def test_the_degrees_that_work_depend_on_the_others() -> None:
    model = model_with_experts(36)  # four experts, rows of 36 and 64
    assert tpv.valid_tp_degrees(model, SimpleNamespace(tp=1, ep=2, dp_shard=2)) == [1, 2, 4]
    assert tpv.valid_tp_degrees(model, SimpleNamespace(tp=1, ep=2, dp_shard=4)) == [1, 2]
    assert tpv.valid_tp_degrees(model, SimpleNamespace(tp=1, ep=2, dp_shard=16)) == []


def test_many_degrees_of_many_unequal_layers_are_judged_without_looking_at_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allows, asked = ShardedDim.allows, []
    monkeypatch.setattr(ShardedDim, "allows", lambda dim, degree: asked.append(degree) or allows(dim, degree))
    dims = tuple(ShardedDim("TP001", 12 * (index + 1), (index,), DIES) for index in range(5000))
    plan = Plan("Tiny", dims, len(dims), ("set {flag} to {degree}",))
    errors = [compat_error(plan, Degrees(tp=tp)) for tp in range(1, 1001)]
    assert [tp for tp, error in enumerate(errors, 1) if error is None] == [1, 2, 3, 4, 6, 12]
    assert len(asked) < 2000
    assert errors[4].valid_degrees == [1, 2, 3, 4, 6, 12]
    assert len(errors[4].violations) == 4000


def test_an_error_that_was_raised_no_longer_depends_on_the_model() -> None:
    model = model_args(8, 2)
    with pytest.raises(tpv.TPCompatError) as caught:
        tpv.validate_tp_compat(model, 4)
    before = str(caught.value)
    model.n_kv_heads = 1
    assert str(caught.value) == before
    assert repr(caught.value) == f"TPCompatError({before!r})"
