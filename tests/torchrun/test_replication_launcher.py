"""``--replicate-kv-heads`` on real jobs of the installed torchtitan."""

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

REPLICATE = "--replicate-kv-heads"


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(partial(toml_job, model="llama3", flavor="8B", tp=16), marks=with_toml),
        # As torchtitan ships it: it can never start by itself.
        pytest.param(
            lambda _: ["--module", "qwen3_5", "--config", "qwen35_122b_a10b"], marks=with_config_modules
        ),
    ],
    ids=["toml", "config module"],
)
def test_a_job_that_is_refused_without_the_flag_gets_to_its_process_group_with_it(
    tmp_path: Path, job: Callable[[Path], list[str]]
) -> None:
    arguments = job(tmp_path)
    refused = launch("torchtitan_tp_validate.train", arguments, tmp_path / "off", nproc=1)
    assert "must divide n_kv_heads" in refused.output, refused
    assert "KV-head replication (--replicate-kv-heads, or " in refused.output, refused
    assert process_groups(tmp_path / "off") == [], refused
    # There are too few ranks for it, which is not what is asked here.
    on = [*arguments, REPLICATE, "--allow", "MESH001,MESH002"]
    started = launch("torchtitan_tp_validate.train", on, tmp_path / "on", nproc=1)
    assert process_groups(tmp_path / "on") == ["process-group-0"], started


@with_toml
def test_weights_gathered_in_float8_are_refused_on_every_rank(tmp_path: Path) -> None:
    gathers = "quantize.linear.float8.enable_fsdp_float8_all_gather"
    arguments = [*toml_job(tmp_path, "llama3", "8B", 16), "--model.converters", "quantize.linear.float8"]
    arguments += [f"--{gathers}", "--parallelism.data_parallel_shard_degree", "2"]
    headline = (
        f"KV-head replication is not supported here: {gathers} = true has FSDP leave wk and wv in float8, "
        "each rank's rows by a scale of its own, and a head has rows of several ranks."
    )
    assert_refused(arguments, headline, tmp_path)


@with_config_modules
def test_a_model_without_kv_heads_is_refused_on_every_rank(tmp_path: Path) -> None:
    arguments = ["--module", "deepseek_v3", "--config", "deepseek_v3_debugmodel", FLAG, "2"]
    headline = (
        "KV-head replication is not supported here: "
        "torchtitan.models.deepseek_v3.model.DeepSeekV3Model.Config has no layers with n_kv_heads."
    )
    assert_refused(arguments, headline, tmp_path)


def assert_refused(arguments: list[str], headline: str, out: Path) -> None:
    result = launch("torchtitan_tp_validate.train", [*arguments, REPLICATE], out, nproc=2)
    assert result.returncode != 0, result
    assert process_groups(out) == [], result
    spoken = result.output.splitlines()
    assert headline in spoken, result
    assert f"[rank 1] {headline}" in spoken, result
    assert f"KVReplicationError: {headline}" in result.output, result
