"""The launcher and the other ways in, on real jobs of the installed torchtitan, no GPU needed.

One job of each kind is started by torchrun as a user would, and so is each whose summary of failures is read:
of ranks that are forks it has the first alone. The others are forks of a process that has imported torch
already, see `tests.forked`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Ended
from tests.forked import run_torchrun as run_forked
from torchtitan_tp_validate.rehearsal.torchrun import Torchrun, run_torchrun

Launched = Torchrun | Ended
REPOSITORY = Path(__file__).parents[2]
PROBE = Path(__file__).parent / "probe"
TIMEOUT = 300
with_toml = pytest.mark.requires(torchtitan="0.2")
with_config_modules = pytest.mark.requires(torchtitan=("0.3", "main"))

FLAG = "--parallelism.tensor_parallel_degree"
LLAMA3_DEBUG = ["--module", "llama3", "--config", "llama3_debugmodel"]
QWEN35_35B = ["--module", "qwen3_5", "--config", "qwen35_35b_a3b"]


def toml_job(folder: Path, model: str, flavor: str, tp: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{model}.toml"
    file.write_text(
        f'[model]\nname = "{model}"\nflavor = "{flavor}"\n[parallelism]\ntensor_parallel_degree = {tp}\n'
    )
    return ["--job.config_file", str(file)]


def launch(
    module: str,
    arguments: Sequence[str],
    out: Path,
    *,
    nproc: int,
    path: Sequence[Path] = (),
    forked: bool = True,
) -> Launched:
    env = {
        "PYTHONPATH": os.pathsep.join(map(str, (PROBE, REPOSITORY, *path))),
        "TP_VALIDATE_PROBE": str(out),
    }
    how: dict[str, Any] = {"nproc": nproc, "timeout": TIMEOUT, "out": out, "cwd": out, "env": env}
    result = run_forked(module, arguments, **how) if forked else run_torchrun(arguments, module=module, **how)
    assert not result.timed_out, result
    assert not result.leftover, result
    return result


def process_groups(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("process-group-*"))


def spoken(result: Launched) -> list[str]:
    """What the ranks printed, without torchrun's own summary after it."""
    return result.output.partition("FAILED\n")[0].splitlines()


def assert_refused(result: Launched, out: Path, *, headline: str, advice: str, nproc: int) -> None:
    assert result.returncode != 0, result
    assert process_groups(out) == [], result
    lines = spoken(result)
    assert lines.count(headline) == 1, result  # the full message once ...
    start = lines.index(headline)
    assert advice in lines[start : start + 20], result
    for rank in range(1, nproc):  # ... and a line on every other rank
        assert lines.count(f"[rank {rank}] {headline}") == 1, result
    others, _, root = result.output.partition("FAILED\n")[2].partition("Root Cause (first observed failure)")
    assert f"TPCompatError: {headline}" in root, result  # torchrun's summary: in full, and shown last ...
    assert advice.strip() in root, result
    assert others.count(headline) == nproc - 1, result  # ... and a line on every other rank
    assert others.count(f"traceback : TPCompatError: {headline} (in full: rank 0)\n") == nproc - 1, result
    for text in (others, root):
        assert "Traceback" not in text, result
        assert "recorded_check" not in text, result


@with_config_modules
def test_qwen35_35b_with_tp_4_is_refused_at_startup_on_every_rank(tmp_path: Path) -> None:
    result = launch("torchtitan_tp_validate.train", [*QWEN35_35B, FLAG, "4"], tmp_path, nproc=2, forked=False)
    assert_refused(
        result,
        tmp_path,
        headline="Tensor parallel degree (4) must divide n_kv_heads (2). "
        "For Qwen3.5-MoE, max supported TP is 2.",
        advice="  parallelism=ParallelismConfig(tensor_parallel_degree=2)",
        nproc=2,
    )


@with_toml
@pytest.mark.parametrize(
    ("model", "flavor", "tp", "headline"),
    [
        (
            "llama3",
            "8B",
            16,
            "Tensor parallel degree (16) must divide n_kv_heads (8). For Llama 3, max supported TP is 8.",
        ),
        (
            "qwen3",
            "30B-A3B",
            8,
            "Tensor parallel degree (8) must divide n_kv_heads (4). For Qwen3-MoE, max supported TP is 4.",
        ),
        (
            "llama4",
            "17bx16e",
            16,
            "Tensor parallel degree (16) must divide n_kv_heads (8). For Llama 4, max supported TP is 8.",
        ),
    ],
)
def test_a_toml_job_is_refused_at_startup(
    tmp_path: Path, model: str, flavor: str, tp: int, headline: str
) -> None:
    job = toml_job(tmp_path, model, flavor, tp)
    result = launch("torchtitan_tp_validate.train", job, tmp_path, nproc=2, forked=False)
    valid = headline.rpartition(" ")[2].rstrip(".")
    assert_refused(result, tmp_path, headline=headline, advice=f"  tensor_parallel_degree = {valid}", nproc=2)


@with_toml
def test_a_flag_overrides_the_toml_file(tmp_path: Path) -> None:
    arguments = [*toml_job(tmp_path, "llama3", "8B", 8), FLAG, "3"]
    result = launch("torchtitan_tp_validate.train", arguments, tmp_path, nproc=1)
    assert "Tensor parallel degree (3) must divide n_kv_heads (8)." in result.output, result
    assert process_groups(tmp_path) == [], result


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(partial(toml_job, model="llama3", flavor="debugmodel", tp=2), marks=with_toml),
        pytest.param(lambda _: [*LLAMA3_DEBUG, FLAG, "2"], marks=with_config_modules),
    ],
    ids=["toml", "config module"],
)
def test_a_compatible_job_is_handed_over_and_gets_to_its_process_group(
    tmp_path: Path, job: Callable[[Path], list[str]]
) -> None:
    result = launch("torchtitan_tp_validate.train", job(tmp_path), tmp_path, nproc=2, forked=False)
    assert process_groups(tmp_path) == ["process-group-0", "process-group-1"], result
    assert "must divide" not in result.output, result


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(partial(toml_job, model="llama3", flavor="8B", tp=16), marks=with_toml),
        pytest.param(lambda _: [*QWEN35_35B, FLAG, "4"], marks=with_config_modules),
    ],
    ids=["toml", "config module"],
)
def test_stock_torchtitan_lets_a_refused_job_get_to_its_process_group(
    tmp_path: Path, job: Callable[[Path], list[str]]
) -> None:
    result = launch("torchtitan.train", job(tmp_path), tmp_path, nproc=1)
    assert process_groups(tmp_path) == ["process-group-0"], result


@with_toml
def test_custom_import_guards_stock_torchtitan_train(tmp_path: Path) -> None:
    arguments = [
        *toml_job(tmp_path, "llama3", "8B", 16),
        *("--experimental.custom_import", "torchtitan_tp_validate.auto"),
    ]
    result = launch("torchtitan.train", arguments, tmp_path, nproc=2, forked=False)
    assert result.returncode != 0, result
    assert process_groups(tmp_path) == [], result
    assert "TPCompatError: Tensor parallel degree (16) must divide n_kv_heads (8)." in result.output, result


@with_toml
def test_custom_import_lets_a_compatible_job_through(tmp_path: Path) -> None:
    arguments = [
        *toml_job(tmp_path, "llama3", "debugmodel", 1),
        *("--experimental.custom_import", "torchtitan_tp_validate.auto"),
    ]
    result = launch("torchtitan.train", arguments, tmp_path, nproc=1)
    assert process_groups(tmp_path) == ["process-group-0"], result


@with_config_modules
def test_install_in_a_users_config_module_guards_stock_torchtitan_train(tmp_path: Path) -> None:
    package = tmp_path / "users_job"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "config_registry.py").write_text(
        "import torchtitan_tp_validate\n"
        "from torchtitan.models.llama3.config_registry import llama3_debugmodel\n"
        "torchtitan_tp_validate.install()\n"
    )
    arguments = ["--module", "users_job", "--config", "llama3_debugmodel", FLAG, "32"]
    result = launch("torchtitan.train", arguments, tmp_path, nproc=1, path=[tmp_path], forked=False)
    assert result.returncode != 0, result
    assert process_groups(tmp_path) == [], result
    assert "TPCompatError: Tensor parallel degree (32) must divide n_heads (16)." in result.output, result


def test_a_mistyped_command_line_is_torchtitans_to_complain_about(tmp_path: Path) -> None:
    result = launch("torchtitan_tp_validate.train", ["--no-such.option", "1"], tmp_path, nproc=1)
    assert result.returncode != 0, result
    assert process_groups(tmp_path) == [], result
