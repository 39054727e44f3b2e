"""Rehearsals of real jobs, from the command line; those of docs/rehearsal.md are run by tests/docs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal.rehearse import assert_equal_to_one_process, rehearse
from torchtitan_tp_validate.rehearsal.told import whole_text

TP_2 = {"tensor_parallel_degree": 2}
TP_2_FLAG = ("--parallelism.tensor_parallel_degree", "2")
MOE = """\
[model]
name = "qwen3"
flavor = "30B-A3B"
[parallelism]
tensor_parallel_degree = 2
"""


@pytest.mark.requires(torchtitan="0.2")
def test_the_router_of_0_2_is_reported_by_name(tmp_path: Path) -> None:
    """Upstream issue #1805, mended by #2416 after 0.2.2."""
    job = tmp_path / "qwen3.toml"
    job.write_text(MOE, encoding="utf-8")
    seen = rehearse(["--job.config_file", str(job)])
    assert (seen.outcome, seen.verdict, seen.output) == ("differs", "fits", "")
    router = "layers.0.moe.router.gate.weight"
    first = seen.differences[0]
    assert (first.what, first.name, first.step) == ("gradient", router, 1)
    assert 0.3 < first.factor < 0.7
    assert router in [difference.name for difference in seen.differences if difference.what == "copies"]


@pytest.mark.requires(torchtitan="0.2")
def test_a_dense_model_of_0_2_is_equal_to_one_process() -> None:
    seen = rehearse(model="llama3", flavor="8B", degrees=TP_2, ranks=2)
    assert (seen.outcome, seen.differences) == ("equal", ())
    assert 0 < seen.worst < 1e-5
    assert seen.degrees == {"tp": 2}


@pytest.mark.requires(torchtitan="0.2")
def test_the_gradients_of_a_pipeline_of_0_2_are_times_the_tokens_of_a_batch() -> None:
    """Upstream issue #2972. Clipping hides it from the loss."""
    seen = rehearse(model="llama3", flavor="8B", degrees={**TP_2, "pipeline_parallel_degree": 2})
    assert (seen.outcome, seen.degrees, seen.local_batch_sizes) == ("differs", {"tp": 2, "pp": 2}, (8, 4))
    first = seen.differences[0]
    # 8 sequences of 32 tokens.
    assert (round(first.factor), first.looks_like) == (256, "counted once per token of a local batch")
    assert "#2972" in first.issue


@pytest.mark.requires(torchtitan="0.3")
@pytest.mark.parametrize("axis", ["pipeline", "context"])
def test_stages_of_a_pipeline_and_cut_sequences_are_equal_to_one_process(axis: str) -> None:
    seen = rehearse(model="llama3", flavor="8B", degrees={**TP_2, f"{axis}_parallel_degree": 2})
    assert (seen.outcome, len(seen.degrees)) == ("equal", 2), whole_text(seen)


@pytest.mark.requires(torchtitan="0.3")
def test_a_pipeline_with_too_few_microbatches_is_seen_to_die() -> None:
    run = ["--module", "llama3", "--config", "llama3_8b", "--training.disable_cuda_graphs"]
    seen = rehearse([*run, *TP_2_FLAG, "--parallelism.pipeline_parallel_degree", "2"])
    assert (seen.outcome, seen.verdict) == ("dies", "fits")
    assert seen.ends[0]["error"] == (
        "ValueError: Number of microbatches (1) must be greater than or equal to the number of stages (2)."
    )


@pytest.mark.requires(torchtitan="0.3")
def test_what_the_rules_refuse_is_seen_to_die() -> None:
    run = ["--module", "qwen3_5", "--config", "qwen35_35b_a3b", TP_2_FLAG[0], "4"]
    with pytest.raises(AssertionError) as caught:
        assert_equal_to_one_process(run)
    lines = str(caught.value).splitlines()
    assert lines[:2] == [
        "qwen3_5 35B-A3B at tp 4, ep 2: dies",
        "  rank 0 and 3 more, building and parallelizing the model: ValueError: tensor_parallel_degree (4) "
        "must divide n_kv_heads (2).",
    ]
    verdict = "Tensor parallel degree (4) must divide n_kv_heads (2). For Qwen3.5-MoE, max supported TP is 2."
    assert f"  by the rules: {verdict}" in lines


@pytest.mark.requires(torchtitan="0.3")
def test_low_precision_is_left_out_and_said_to_be() -> None:
    seen = rehearse(["--module", "llama3", "--config", "llama3_debugmodel_float8", *TP_2_FLAG])
    assert (seen.outcome, seen.stand_ins) == ("equal", ("Float8Linear in fp32", "flex attention"))


@pytest.mark.requires(torchtitan="0.3")
def test_a_package_of_somebody_s_own_is_made_small_by_the_same_rules() -> None:
    seen = assert_equal_to_one_process(
        ["--module", "tests.torchrun.own_model", "--config", "own_8b", *TP_2_FLAG]
    )
    assert seen.model == "own 8B"


@pytest.mark.requires(torchtitan="0.3")
def test_what_cannot_be_made_small_is_rehearsed_as_it_is_if_it_is_small() -> None:
    package = "tests.torchrun.own_model"
    with pytest.raises(RehearsalError) as caught:
        rehearse(model=package, flavor="8B-square", degrees=TP_2)
    assert str(caught.value) == (
        "layers[0].expander.widen is 4096 by 4096, and the model's dim is 4096: it is not known whether it "
        "reads or writes the residual stream; rehearse a flavor of at most 50,000,000 parameters, which is "
        "taken as it is: this one has 3,466,858,496."
    )
    assert_equal_to_one_process(model=package, flavor="small-square", degrees=TP_2)


@pytest.mark.requires(torchtitan="0.3")
def test_the_transformers_backend_never_initializes_its_rotary_embedding(tmp_path: Path) -> None:
    """It looks for ``rope_init_fn``, which no rotary embedding of transformers 5 keeps; all else is equal."""
    from transformers import Qwen3Config

    Qwen3Config(architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
    backend = "transformers_modeling_backend"
    run = ["--module", backend, "--config", f"{backend}_full", "--hf_model", str(tmp_path), *TP_2_FLAG]
    seen = rehearse(run)
    assert seen.outcome == "differs"
    assert {(one.what, one.name) for one in seen.differences} == {
        ("uninitialized", f"model.model.rotary_emb.{name}") for name in ("inv_freq", "original_inv_freq")
    }


def test_a_job_that_torchtitan_does_not_take_cannot_be_rehearsed() -> None:
    with pytest.raises(RehearsalError, match=r"^torchtitan does not take the job"):
        rehearse(["--nonsense", "1"])


@pytest.mark.requires(torchtitan="0.3")
def test_experts_of_a_gpu_s_dispatcher_are_dispatched_by_all_to_all() -> None:
    run = ["--module", "deepseek_v3", "--config", "deepseek_v3_16b_hybridep", *TP_2_FLAG]
    seen = assert_equal_to_one_process([*run, "--parallelism.expert_parallel_degree", "2"])
    assert "AllToAllTokenDispatcher for HybridEPTokenDispatcher" in seen.stand_ins


def test_what_is_kept_repeats_the_rehearsal(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    seen = rehearse(model="llama3", flavor="8B", degrees=TP_2, ranks=2, keep=kept)
    assert seen.outcome == "equal"
    with pytest.raises(RehearsalError) as caught:
        rehearse(model="llama3", flavor="8B", keep=kept)
    assert str(caught.value) == f"{kept} is not empty: what is in it is not overwritten."
    gradients = torch.load(kept / "microbatch-1" / "rehearsal-rank1.pt")["steps"]
    wanted = torch.load(kept / "microbatch-1" / "reference.pt")["steps"]
    assert [step.keys() for step in gradients] == [step.keys() for step in wanted]
    ended = subprocess.run([sys.executable, kept / "repeat.py"], capture_output=True, text=True, check=True)
    assert ended.stdout == whole_text(seen) + "\n"


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_a_rehearsal_whose_process_ends(tmp_path: Path, by: signal.Signals) -> None:
    model = ["--model", "llama3", "--flavor", "8B", "--tp", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torchtitan_tp_validate", "rehearse", *model],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # Ranks have logs as soon as they are there.
    _until(lambda: any(tmp_path.glob("*/*/*.log")))
    process.send_signal(by)
    process.wait(60)
    _until(lambda: not any(tmp_path.iterdir()) and not _processes_of(tmp_path))


def _until(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _processes_of(folder: Path) -> list[str]:
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = command.read_text(encoding="utf-8", errors="replace")
        except OSError:  # ended meanwhile
            continue
        if str(folder) in text:
            found.append(text)
    return found
