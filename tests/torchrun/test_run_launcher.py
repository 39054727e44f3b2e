"""Layouts and known faults on real jobs of the installed torchtitan: refused, repaired, allowed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.torchrun.test_launcher import (
    FLAG,
    launch,
    process_groups,
    toml_job,
    with_config_modules,
    with_toml,
)

LAUNCHER = "torchtitan_tp_validate.train"
GPT_OSS = ("--module", "gpt_oss", "--config", "gpt_oss_20b", "--training.disable_cuda_graphs")
FAULTY = [
    pytest.param(
        partial(toml_job, model="deepseek_v3", flavor="16B", tp=2),
        "NUM001",
        marks=with_toml,
        id="toml",
    ),
    pytest.param(
        lambda _: [*GPT_OSS, FLAG, "2", "--parallelism.expert_parallel_degree", "1"],
        "NUM004",
        marks=with_config_modules,
        id="config module",
    ),
]


@pytest.mark.parametrize(("job", "code"), FAULTY)
def test_a_run_that_would_train_wrong_is_refused_repaired_or_allowed(
    tmp_path: Path, job: Callable[[Path], list[str]], code: str
) -> None:
    arguments = job(tmp_path)
    headline = (
        "This run cannot work: the installed torchtitan trains this model wrong at tensor_parallel_degree 2."
    )
    refused = launch(LAUNCHER, arguments, tmp_path / "refused", nproc=2)
    assert refused.returncode != 0, refused
    assert process_groups(tmp_path / "refused") == [], refused
    lines = refused.output.splitlines()
    assert headline in lines, refused
    assert f"[rank 1] {headline}" in lines, refused
    assert f"  {code} the installed torchtitan" in refused.output, refused
    both = ["process-group-0", "process-group-1"]
    repaired = launch(LAUNCHER, [*arguments, "--repair"], tmp_path / "repaired", nproc=2)
    assert process_groups(tmp_path / "repaired") == both, repaired
    assert code not in repaired.output, repaired
    allowed = launch(LAUNCHER, [*arguments, f"--allow={code.lower()}"], tmp_path / "allowed", nproc=2)
    assert process_groups(tmp_path / "allowed") == both, allowed
    assert allowed.output.count(f"RunWarning: {code} the installed torchtitan trains this") == 1, allowed


def test_ranks_that_the_degrees_do_not_make_are_refused_by_every_rank(tmp_path: Path) -> None:
    job = ["--parallelism.data_parallel_shard_degree", "4"]
    from importlib.metadata import version

    if version("torchtitan").startswith("0.2"):
        job = [*toml_job(tmp_path, "llama3", "debugmodel", 1), *job]
    else:
        job = ["--module", "llama3", "--config", "llama3_debugmodel", *job]
    result = launch(LAUNCHER, job, tmp_path / "out", nproc=2)
    headline = "This run cannot work: data_parallel_shard_degree (4) is not the number of ranks (2)."
    assert result.returncode != 0, result
    assert process_groups(tmp_path / "out") == [], result
    assert headline in result.output.splitlines(), result
    assert f"[rank 1] {headline}" in result.output.splitlines(), result
    assert f"RunError: {headline}" in result.output, result


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--check-replicas", "no"], "--check-replicas wants a number of steps: --check-replicas 100."),
        (["--allow"], "--allow wants the code of a rule: --allow NUM001, or --allow NUM001,PP005."),
        (
            ["--allow", "NUM999"],
            "torchtitan-tp-validate has no rule on a run 'NUM999'; did you mean",
        ),
    ],
)
def test_a_rule_that_is_none_cannot_be_allowed(tmp_path: Path, words: list[str], said: str) -> None:
    result = launch(LAUNCHER, words, tmp_path, nproc=1)
    assert result.returncode != 0, result
    assert said in result.output, result
    assert process_groups(tmp_path) == [], result
