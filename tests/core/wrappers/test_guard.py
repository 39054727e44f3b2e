from __future__ import annotations

import copy
import inspect
import warnings
from types import SimpleNamespace as NS
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from tests.core.shapes import attention_layer, config_tree, model_args
from torchtitan_tp_validate.wrappers.guard import guard


def parallelize_tiny(model: Any, *, parallel_dims: Any, training: Any = "default") -> Any:
    """Parallelize a tiny model."""
    return model, parallel_dims, training


def test_a_guard_keeps_signature_name_docstring_and_result() -> None:
    guarded = guard(parallelize_tiny)
    assert inspect.signature(guarded) == inspect.signature(parallelize_tiny)
    assert (guarded.__name__, guarded.__doc__) == (parallelize_tiny.__name__, parallelize_tiny.__doc__)
    model, dims = model_args(8, 2), NS(tp=2)
    assert guarded(model, parallel_dims=dims, training=3) == (model, dims, 3)
    assert copy.deepcopy(guarded) is guarded


def test_a_guard_checks_before_the_function_is_entered() -> None:
    def parallelize(model: Any, parallel_dims: Any, job_config: Any) -> None:
        raise AssertionError("entered")

    for arguments in (
        ((model_args(8, 2), NS(tp=4), None), {}),
        ((model_args(8, 2),), {"parallel_dims": NS(tp=4), "job_config": None}),
    ):
        with pytest.raises(tpv.TPCompatError):
            guard(parallelize)(*arguments[0], **arguments[1])


def test_an_unreadable_model_goes_through_with_a_warning() -> None:
    with pytest.warns(
        tpv.NotValidatedWarning, match=r"Not validated: cannot find head counts .* The run goes on unchecked"
    ):
        assert guard(parallelize_tiny)("flux", parallel_dims=NS(tp=4))[0] == "flux"


def told(*calls: dict[str, Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            guard(parallelize_tiny)(**call)
    return [str(warning.message) for warning in caught]


def test_every_guard_of_a_process_says_the_same_only_once() -> None:
    call = {"model": "flux", "parallel_dims": NS(tp=4)}
    assert len(told(call, call)) == 1
    assert told(call) == []


def test_a_run_that_lacks_what_a_rule_reads_says_so_once() -> None:
    call = {"model": config_tree(attention_layer(8, 2)), "parallel_dims": NS(tp=2)}
    assert told({**call, "training": NS(max_norm=1.0)}, {**call, "training": NS()}) == [
        "Not validated: TP009: no seq_len is given. All other rules were applied to SimpleNamespace."
    ]
    assert told({**call, "training": NS(seq_len=64)}, {**call, "training": None}) == []


def test_a_compatible_call_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard(parallelize_tiny)(model_args(8, 2), parallel_dims=NS(tp=2))


def test_a_call_that_upstream_would_not_take_fails_the_same_way() -> None:
    with pytest.raises(TypeError, match="parallel_dims"):
        guard(parallelize_tiny)(model_args(8, 2))


def test_a_wrapper_that_hands_everything_on_is_guarded_too() -> None:
    for function in (
        lambda *args, **kwargs: "went through",
        lambda model, **kwargs: "went through",
        lambda model, *args: "went through",
    ):
        assert (
            guard(function)(model_args(8, 2), *_dims(function, 2)[0], **_dims(function, 2)[1])
            == "went through"
        )
        with pytest.raises(tpv.TPCompatError):
            guard(function)(model_args(8, 2), *_dims(function, 4)[0], **_dims(function, 4)[1])


def _dims(function: Any, tp: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """By position where the function takes it so, else by keyword."""
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    return (
        ((NS(tp=tp),), {})
        if inspect.Parameter.VAR_POSITIONAL in kinds
        else ((), {"parallel_dims": NS(tp=tp)})
    )


def test_a_function_without_model_and_parallel_dims_cannot_be_guarded() -> None:
    with pytest.raises(
        tpv.InstallError, match="takes no model and no parallel_dims, so it cannot be guarded"
    ):
        guard(lambda net: net)
