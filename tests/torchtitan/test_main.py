"""torchtitan's main: told by its files, judged by its own fields, and rehearsed as any release."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.core.cli.conftest import Program
from torchtitan_tp_validate.rehearsal.rehearse import rehearse

pytestmark = pytest.mark.requires(torchtitan="main")

TP = "--parallelism.tensor_parallel_degree"
DP = "--parallelism.data_parallel_shard_degree"
LLAMA3 = ("--", "--module", "llama3", "--config", "llama3_debugmodel")
PIPELINE = ("--parallelism.pipeline_parallel_degree", "2", "--training.disable_cuda_graphs")
BUDGET = "--training.num_tokens_per_microbatch_per_dp_rank"


def test_the_doctor_says_that_it_is_main_and_that_all_that_is_read_is_there(tp_validate: Program) -> None:
    status, out, _ = tp_validate("doctor")
    assert status == 0
    assert "torchtitan main (newer than 0.3.0, like 2026-08)\n" in out
    assert "not guarded  llama4: parallelize_llama: torchtitan main has no such model\n" in out
    assert json.loads(tp_validate("doctor", "--output-format", "json").out)["gone"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            (TP, "8", BUDGET, "4100"),
            "TP009 num_tokens_per_microbatch_per_dp_rank = 4100 is not a multiple of 8",
        ),
        (
            ("--parallelism.context_parallel_degree", "2", BUDGET, "4098"),
            "SEQ001 num_tokens_per_microbatch_per_dp_rank (4098) is not a multiple of 4",
        ),
        (
            ("--parallelism.context_parallel_degree", "2", "--parallelism.spmd_backend", "partial_dtensor"),
            "RUN001 torchtitan itself refuses this run: Context Parallel requires",
        ),
        (
            (*PIPELINE, "--parallelism.pipeline_parallel_schedule", "1F1B"),
            "PP005 num_pp_microbatches = 1 microbatches are fewer than the 2 stages",
        ),
        (
            (BUDGET, "4096", "--training.num_tokens_per_train_step", "6144"),
            "BATCH001 num_tokens_per_train_step (6144) is not a multiple of",
        ),
        ((TP, "32"), "TP001 n_heads = 16 is not a multiple of 32"),
    ],
)
def test_its_own_fields_are_judged(arguments: tuple[str, ...], words: str, tp_validate: Program) -> None:
    status, out, _ = tp_validate("check", "--world-size", "32", *LLAMA3, *arguments)
    assert status == 1
    assert words in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("gpt_oss", "gpt_oss_20b", TP, "2", "--parallelism.expert_parallel_degree", "1"), "NUM004"),
        (("gpt_oss", "gpt_oss_20b", TP, "2", "--parallelism.spmd_backend", "partial_dtensor"), "NUM005"),
        (("qwen3", "qwen3_30b_a3b", TP, "2", "--parallelism.spmd_backend", "partial_dtensor"), "NUM006"),
        (("transformers_modeling_backend", "transformers_modeling_backend_debugmodel"), "NUM011"),
        (("llama3", "llama3_8b", DP, "16", "--checkpoint.enable", "--checkpoint.last_save_in_hf"), "CKPT001"),
        (("llama3", "llama3_8b", DP, "8", "--checkpoint.enable", "--checkpoint.last_save_in_hf"), ""),
        (("qwen3", "qwen3_30b_a3b", TP, "2"), ""),
        (("muse_glimmer", "muse_glimmer_debugmodel", TP, "2"), ""),
    ],
)
def test_it_is_accused_of_the_faults_that_it_still_has(
    arguments: tuple[str, ...], code: str, tp_validate: Program
) -> None:
    module, config, *more = arguments
    run = ("--module", module, "--config", config, "--training.disable_cuda_graphs", *more)
    status, out, _ = tp_validate("check", "--", *run)
    assert (status, "This run cannot work" in out) == ((1, True) if code else (0, False))
    assert code in out


@pytest.mark.parametrize(
    ("arguments", "options", "outcome"),
    [
        (("llama3", "llama3_debugmodel", TP, "2"), {}, "equal"),
        (("gpt_oss", "gpt_oss_debugmodel", TP, "2"), {"repair": True}, "equal"),
        (("gpt_oss", "gpt_oss_debugmodel", TP, "2"), {}, "differs"),
        (("qwen3_5", "qwen35_0_8b", TP, "4"), {"replicate_kv_heads": True}, "equal"),
    ],
)
def test_its_trainer_is_rehearsed(arguments: tuple[str, ...], options: dict[str, Any], outcome: str) -> None:
    module, config, *more = arguments
    assert rehearse(("--module", module, "--config", config, *more), **options).outcome == outcome
