"""Rehearsals of real jobs, from the command line; those of docs/rehearsal.md are run by tests/docs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal.rehearse import rehearse

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
    seen = rehearse(model="llama3", flavor="8B", degrees={"tensor_parallel_degree": 2})
    assert (seen.outcome, seen.differences) == ("equal", ())
    assert 0 < seen.worst < 1e-5
    assert seen.degrees == {"tp": 2}


@pytest.mark.requires(torchtitan="0.3")
def test_stages_of_a_pipeline_and_cut_sequences_are_equal_to_one_process() -> None:
    run = ["--module", "llama3", "--config", "llama3_8b", "--training.disable_cuda_graphs"]
    degrees = ("tensor_parallel_degree", "pipeline_parallel_degree", "context_parallel_degree")
    run += [word for degree in degrees[:2] for word in (f"--parallelism.{degree}", "2")]
    seen = rehearse(run)
    assert (seen.outcome, seen.degrees) == ("equal", {"tp": 2, "pp": 2}), seen
    seen = rehearse(model="llama3", flavor="8B", degrees={degrees[0]: 2, degrees[2]: 2})
    assert (seen.outcome, seen.degrees) == ("equal", {"tp": 2, "cp": 2}), seen


@pytest.mark.requires(torchtitan="0.3")
def test_what_the_rules_refuse_is_seen_to_die() -> None:
    seen = rehearse(
        ["--module", "qwen3_5", "--config", "qwen35_35b_a3b", "--parallelism.tensor_parallel_degree", "4"]
    )
    assert (seen.outcome, len(seen.ends)) == ("dies", 4)
    assert seen.verdict.startswith("Tensor parallel degree (4) must divide n_kv_heads (2).")
    assert {end["error"] for end in seen.ends} == {
        "ValueError: tensor_parallel_degree (4) must divide n_kv_heads (2)."
    }


def test_a_job_that_torchtitan_does_not_take_cannot_be_rehearsed() -> None:
    with pytest.raises(RehearsalError, match=r"^torchtitan does not take the job"):
        rehearse(["--nonsense", "1"])


@pytest.mark.requires(torchtitan="0.3")
def test_kernels_of_a_gpu_are_named_where_there_is_no_stand_in() -> None:
    with pytest.raises(RehearsalError) as caught:
        rehearse(["--module", "llama3", "--config", "llama3_debugmodel_float8"])
    assert str(caught.value) == "layers[0].attention.qkv_linear.wqkv is a Float8Linear, which takes a GPU."


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
    _until(lambda: any(tmp_path.glob("*/*.log")))
    process.send_signal(by)
    process.wait(60)
    _until(lambda: not any(tmp_path.iterdir()) and not _processes_of(tmp_path))


def _until(condition: object, seconds: float = 120.0) -> None:
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
