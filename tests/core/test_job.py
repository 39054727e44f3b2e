"""What is read of a parsed job, without any torchtitan."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace as NS
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from tests.core.shapes import attention_layer, config_tree
from torchtitan_tp_validate.degrees import degrees_of_job
from torchtitan_tp_validate.job import check_job, unguarded
from torchtitan_tp_validate.releases.base import RequestedModel, called_function


def parallelize(model: Any, *, parallel_dims: Any) -> None: ...


def hands_on(model: Any, **kwargs: Any) -> None:
    parallelize(model, **kwargs)


class Parallelizes:
    def __call__(self, model: Any, **kwargs: Any) -> None:
        parallelize(model, **kwargs)


def job(model: Any, tp: int, *, training: Any, function: Any = parallelize) -> Any:
    spec = NS(name="mine", flavor="tiny", model=model, parallelize_fn=function)
    return NS(model_spec=spec, parallelism=NS(tensor_parallel_degree=tp), training=training)


@pytest.mark.parametrize(
    ("training", "tokens"),
    [
        (NS(seq_len=48), 48),
        (NS(max_context_length=16, num_tokens_per_microbatch_per_dp_rank=96), 96),  # main, after 0.3.0
        (NS(), None),
        (None, None),
    ],
)
def test_the_tokens_that_are_split_are_read_under_either_name(training: Any, tokens: int | None) -> None:
    assert degrees_of_job(job(None, 2, training=training)).seq_len == tokens


def test_main_refuses_tokens_that_do_not_divide_too() -> None:
    config = job(
        config_tree(attention_layer(8, 4)), 4, training=NS(num_tokens_per_microbatch_per_dp_rank=4098)
    )
    with pytest.raises(tpv.TPCompatError, match="TP009"):
        check_job(config, guarded=[config.model_spec.parallelize_fn])


@pytest.mark.parametrize("backend", ["spmd_types", "partial_dtensor", "full_dtensor"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_the_trainer_refuses_an_uneven_sequence_on_every_backend(
    backend: str, sequence_parallel: bool
) -> None:
    model = config_tree(attention_layer(8, 4))
    config = job(model, 4, training=NS(seq_len=4098))
    config.parallelism.spmd_backend = backend
    config.parallelism.enable_sequence_parallel = sequence_parallel
    if not sequence_parallel:
        check_job(config, guarded=[config.model_spec.parallelize_fn])
        return
    with pytest.raises(tpv.TPCompatError) as error:
        check_job(config, guarded=[config.model_spec.parallelize_fn])
    assert [violation.code for violation in error.value.violations] == ["TP009"]
    assert "the Trainer refuses it when the process groups are up" in str(error.value)
    # Without a Trainer, a script's own parallelize call: DTensor takes uneven parts.
    call = NS(tp=4, spmd_backend=backend)
    if backend == "spmd_types":
        with pytest.raises(tpv.TPCompatError):
            tpv.validate_tp_compat(model, call, seq_len=4098)
    else:
        tpv.validate_tp_compat(model, call, seq_len=4098)


def told(config: Any, times: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            check_job(config, guarded=[config.model_spec.parallelize_fn])
    return [str(warning.message) for warning in caught]


def test_a_job_that_cannot_be_judged_says_so_once_by_name_and_reason() -> None:
    assert told(job(config_tree(NS()), 2, training=NS(seq_len=8)), times=2)[0].startswith(
        "Not validated at startup: mine tiny: "
    )
    assert told(job(config_tree(NS()), 2, training=NS(seq_len=8))) == []


def test_a_checkpoint_that_is_not_here_is_said_not_to_be_validated() -> None:
    config = job(config_tree(attention_layer(8, 4)), 2, training=NS(seq_len=8))
    config.dump_folder = "/nowhere"
    config.checkpoint = NS(
        **{"enable": True, "folder": "checkpoint", "load_step": -1, "exclude_from_loading": []},
        **{"initial_load_path": "/nowhere/step-1", "initial_load_model_only": True},
        **{"initial_load_in_hf": False, "initial_load_in_hf_quantized": False, "last_save_in_hf": False},
    )
    assert told(config) == [
        "Not validated at startup: CKPT002, CKPT003, CKPT004: /nowhere/step-1 is no folder of this machine."
    ]


def test_of_many_ranks_the_first_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert told(job(config_tree(NS()), 2, training=NS(seq_len=8))) == []


def test_a_function_that_hands_on_to_a_guarded_one_is_guarded_unless_a_solver_is_asked_for() -> None:
    def problem(function: Any, run: Any = None) -> str | None:
        model = RequestedModel("mine", None, called_function(function))
        return unguarded(model, run, guarded=[parallelize])

    solver = NS(compile=NS(enable_autoparallel=True))
    assert problem(parallelize) is problem(hands_on) is problem(parallelize, solver) is None
    assert problem(hands_on, solver) == (
        f"mine is parallelized by {__name__}.hands_on with compile.enable_autoparallel, which is not guarded."
    )
    assert problem(functools.partial(parallelize)) is problem(Parallelizes()) is None
    assert problem(functools.partial(functools.partial(hands_on), model=None), solver) == problem(
        hands_on, solver
    )
    assert problem(told) == f"mine is parallelized by {__name__}.told, which is not guarded."
