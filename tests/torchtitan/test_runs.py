"""Runs as a whole, of real jobs: by `validate_job`, without a device or a process group."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

import torchtitan_tp_validate as tpv
from tests.torchtitan.installed import HAS_CONFIG_TREES, RELEASE
from torchtitan_tp_validate.degrees import degrees_of_job
from torchtitan_tp_validate.errors import RunWarning, UnknownNameError
from torchtitan_tp_validate.hardware import build_for_its_hardware
from torchtitan_tp_validate.job import Options, judge_job, parse_command_line
from torchtitan_tp_validate.rehearsal.jobs.batch import read_batch, set_batch
from torchtitan_tp_validate.releases import runs
from torchtitan_tp_validate.wrappers.guard import guardable_functions

OLD = not HAS_CONFIG_TREES
only_0_2, only_0_3 = pytest.mark.requires(torchtitan="0.2"), pytest.mark.requires(torchtitan="0.3")


def job(
    model: str = "llama3", flavor: str = "debugmodel", *, config_name: str = "", **parallelism: Any
) -> Any:
    """A job of a model, with fields of ``[parallelism]``, and ``batch``, ``seq_len`` and ``whole``.

    A config that is not named after its model has a name of its own.
    """
    if OLD:
        from torchtitan.config import JobConfig

        config = JobConfig()
        config.model.name, config.model.flavor = model, flavor
    else:
        config = parse_command_line(["--module", model, "--config", config_name or f"{model}_{flavor}"])
        config.training.disable_cuda_graphs = True
    sizes = {"batch": "local", "seq_len": "seq_len", "whole": "total"}
    given = {sizes[name]: parallelism.pop(name) for name in sizes if name in parallelism}
    for name, value in parallelism.items():
        setattr(config.parallelism, name, value)
    if given:
        set_batch(config, replace(read_batch(config), **given))
    return config


def refusal_of(config: Any, **options: Any) -> tpv.TPCompatError | None:
    """What a job is refused with."""
    verdict = judge_job(config, guarded=guardable_functions(), options=Options(**options))
    assert verdict is not None
    return verdict.error


def codes(config: Any, **options: Any) -> list[str]:
    """The codes of everything that speaks against a job."""
    error = refusal_of(config, **options)
    return [one.code for one in (*error.violations, *error.problems)] if error else []


def test_a_job_that_fits_is_accepted_and_left_as_it_is() -> None:
    config = job(data_parallel_shard_degree=4)
    before = copy.deepcopy(config)
    tpv.validate_job(config, world_size=4)
    assert repr(config) == repr(before)
    assert not dist.is_initialized()


def test_everything_that_speaks_against_a_job_is_said_at_once() -> None:
    config = job(tensor_parallel_degree=32, data_parallel_shard_degree=2, whole=7)
    with pytest.raises(tpv.TPCompatError) as caught:
        tpv.validate_job(config, world_size=3)
    assert {violation.code for violation in caught.value.violations} >= {"TP001"}
    assert [problem.code for problem in caught.value.problems] == ["MESH001", "BATCH001"]
    assert isinstance(caught.value, tpv.RunError)
    assert not dist.is_initialized()


def test_the_number_of_ranks_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(data_parallel_shard_degree=4)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert codes(config) == []
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert codes(config) == ["MESH001"]
    assert codes(config, world_size=4) == []
    config.comm.mode = "fake_backend"
    assert codes(config) == []


def test_a_degree_that_crosses_nodes_is_warned_of() -> None:
    config = job(tensor_parallel_degree=16, data_parallel_shard_degree=1)
    with pytest.warns(RunWarning, match=r"^NODE001 tensor_parallel_degree \(16\) does not divide the 8 GPUs"):
        tpv.validate_job(config, world_size=16, gpus_per_node=8)


@pytest.mark.requires(torchtitan=("0.2", "0.3"))
def test_a_validation_to_the_end_of_what_each_rank_has_is_warned_of() -> None:
    config = job()
    name = "validation" if OLD else "validator"
    section = getattr(config, name)
    section.enable, section.steps = True, -1
    with pytest.warns(RunWarning, match=rf"^VAL001 {name}\.steps is -1 on 4 data parallel ranks"):
        tpv.validate_job(config, world_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RunWarning)
        tpv.validate_job(config, world_size=1)
        section.steps = 10
        tpv.validate_job(config, world_size=4)


def test_a_rule_that_is_allowed_warns() -> None:
    config = job(data_parallel_shard_degree=4, whole=7)
    with pytest.raises(tpv.RunError, match="BATCH001"):
        tpv.validate_job(config, world_size=4)
    with pytest.warns(RunWarning, match="^BATCH001 (global_batch_size|num_tokens_per_train_step)"):
        tpv.validate_job(config, world_size=4, allow=("BATCH001",))
    with pytest.raises(UnknownNameError, match="no rule on a run 'BATCH999'"):
        tpv.validate_job(config, allow=("BATCH999",))


def test_what_torchtitan_refuses_itself_is_refused_in_its_words() -> None:
    if OLD:
        config = job("gpt_oss", context_parallel_degree=2)
        if config.model.name not in {"gpt_oss"} or RELEASE != "0.2.2":
            pytest.skip("gpt_oss is an experiment before 0.2.2")
        words = "torchtitan itself refuses this run: CP support for gpt-oss model is still in progress"
    else:
        config = job(seq_len=2**20)
        words = "torchtitan itself refuses this run: Training sequence length 1048576 exceeds attention RoPE"
    with pytest.raises(tpv.RunError) as caught:
        tpv.validate_job(config)
    assert str(caught.value).startswith(f"This run cannot work: {words}")
    assert codes(config)[0] == "RUN001"


@only_0_3
def test_what_a_parallelize_function_refuses_is_heard_before_it_has_a_model() -> None:
    pytest.importorskip("fla")
    config = parse_command_line(["--module", "qwen3_5", "--config", "qwen35_debugmodel"])
    config.training.disable_cuda_graphs = True
    config.parallelism.context_parallel_degree = 2
    with pytest.raises(tpv.RunError) as caught:
        tpv.validate_job(config)
    assert str(caught.value).startswith(
        "This run cannot work: torchtitan's parallelize function refuses this run: Context Parallel is not "
        "yet supported for Qwen3.5."
    )
    assert not dist.is_initialized()


@only_0_2
def test_a_model_of_0_2_is_judged_by_its_sizes_before_it_is_built() -> None:
    verdict = judge_job(job(tensor_parallel_degree=2), guarded=guardable_functions())
    assert verdict is not None
    assert verdict.plan is not None
    assert [dim.size for dim in verdict.plan.dims if dim.code == "TP005"] == [768]
    assert verdict.plan.not_judged == ()


def test_a_function_of_somebody_s_own_is_not_asked() -> None:
    def parallelize(model: Any, **_: Any) -> Any:
        raise AssertionError("called")

    assert runs.refusal_of(parallelize, {}, degrees_of_job(job()), 1, {}) == ""


def test_an_error_that_is_not_torchtitan_s_own_is_not_its_words() -> None:
    with pytest.raises(ValueError, match="of this file") as caught:
        raise ValueError("of this file")
    assert runs.own_words(caught.value) == ""


def test_no_config_that_torchtitan_registers_is_refused_by_what_it_says_before_it_has_a_model() -> None:
    if OLD:
        models = {"llama3": "8B", "qwen3": "32B", "deepseek_v3": "16B", "llama4": "17bx16e"}
        assert all(codes(job(*one)) == [] for one in models.items())
        return
    from torchtitan_tp_validate import registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for build in registry.configs("qwen3").values():
            config, _ = build_for_its_hardware(build)
            assert "RUN002" not in codes(config)


@pytest.mark.requires(torchtitan="0.2.0")
def test_a_mesh_that_the_release_alone_refuses_is_told() -> None:
    config = job(
        "deepseek_v3",
        expert_parallel_degree=2,
        context_parallel_degree=4,
        data_parallel_shard_degree=2,
    )
    verdict = judge_job(config, guarded=guardable_functions(), options=Options(world_size=8))
    assert verdict is not None
    assert verdict.error is not None
    assert [problem.text for problem in verdict.error.problems] == [
        "torchtitan's parallelize function refuses this run: ParallelDims wants ep % cp == 0 and "
        "(dp_shard * cp) % ep == 0"
    ]
