"""Every way to read degrees reads the same of the same run."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace as NS

import pytest

import torchtitan_tp_validate as tpv
from torchtitan_tp_validate.degrees import (
    FLAGS,
    PIPELINE_FLAG,
    Axis,
    Degrees,
    degrees_of_call,
    degrees_of_job,
    noun,
    read_degrees,
    token_field,
)

PACKAGE = Path(tpv.__file__).parent
EACH = {field: number for number, field in enumerate(FLAGS, start=2)}


def test_the_table_is_of_the_degrees_that_a_run_has() -> None:
    assert FLAGS.keys() <= {field.name for field in dataclasses.fields(Degrees)}
    assert {axis.value for axis in Axis} <= FLAGS.keys()
    assert {noun(field): FLAGS[field] for field in ("tp", "dp_shard")} == {
        "Tensor parallel degree": "tensor_parallel_degree",
        "Data parallel shard degree": "data_parallel_shard_degree",
    }


def test_an_int_a_parallel_dims_a_call_and_a_job_are_read_alike() -> None:
    assert read_degrees(4) == read_degrees(NS(tp=4)) == Degrees(tp=4)
    parallel_dims = NS(**EACH, spmd_backend="full_dtensor")
    read = read_degrees(parallel_dims)
    assert {field: getattr(read, field) for field in FLAGS} == EACH
    assert read.spmd_backend == "full_dtensor"
    parallelism = NS(
        **{FLAGS[field]: degree for field, degree in EACH.items()},
        spmd_backend="full_dtensor",
        enable_sequence_parallel=False,
    )
    run = NS(parallelism=parallelism, training=NS(seq_len=48))
    whole = dataclasses.replace(read, seq_len=48, sequence_parallel=False)
    assert degrees_of_job(run) == dataclasses.replace(whole, in_trainer=True)
    assert degrees_of_call({"parallel_dims": parallel_dims, "job_config": run}) == whole
    assert degrees_of_call({"parallel_dims": parallel_dims, **vars(run)}) == whole
    assert degrees_of_call({"parallel_dims": parallel_dims}) == read


def test_a_data_parallel_degree_that_is_left_to_the_number_of_ranks_is_not_known() -> None:
    run = NS(parallelism=NS(tensor_parallel_degree=2, data_parallel_shard_degree=-1))
    assert degrees_of_job(run) == Degrees(tp=2, dp_shard_is_known=False, in_trainer=True)


def test_tensor_parallelism_within_experts_follows_that_of_the_run_where_it_equals_it() -> None:
    assert Degrees(tp=2, ep=2, etp=2).vary(tp=4) == Degrees(tp=4, ep=2, etp=4)
    assert Degrees(tp=2, ep=2).vary(tp=4) == Degrees(tp=4, ep=2)
    assert Degrees(tp=1, ep=2).vary(tp=4) == Degrees(tp=4, ep=2)


@pytest.mark.parametrize("field", FLAGS)
def test_a_degree_that_is_none_is_named_by_its_noun_and_its_source(field: str) -> None:
    source = f"of type int (from SimpleNamespace.{field})"
    text = f"{noun(field)} must be a whole number of at least 1, got 0 {source}"
    with pytest.raises(tpv.TPDegreeError, match=re.escape(text)):
        read_degrees(NS(**{**EACH, field: 0}))


def test_the_tokens_are_called_as_the_loaded_torchtitan_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert token_field() == "seq_len"
    field = "num_tokens_per_microbatch_per_dp_rank"
    config = NS(TrainingConfig=dataclasses.make_dataclass("TrainingConfig", [field]))
    monkeypatch.setitem(sys.modules, "torchtitan.config", config)
    assert token_field() == field


def test_no_other_file_holds_a_table_of_degrees() -> None:
    names = {*FLAGS.values(), PIPELINE_FLAG}
    tables = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(f'"{name}"' in path.read_text(encoding="utf-8") for name in names)
    }
    assert tables == {"degrees.py"}
