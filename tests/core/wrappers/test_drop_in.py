from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.fake_torchtitan import fake_0_2, fake_0_3, fake_fork

USE = """
import inspect, pickle, sys
from types import SimpleNamespace as NS
import torchtitan_tp_validate as tpv
from torchtitan_tp_validate.wrappers.{wrapper} import {name} as ours
import {upstream} as upstream
theirs = upstream.{function}
assert inspect.signature(ours) == inspect.signature(theirs)
assert ours.__doc__ == theirs.__doc__
assert pickle.loads(pickle.dumps(ours)) is ours
others = inspect.signature(theirs).parameters.keys() - {{"model", "parallel_dims"}}
more = dict.fromkeys(others)
model = NS(model_args=NS(n_heads=8, n_kv_heads=2, n_layers=2))
assert ours(model, parallel_dims=NS(tp=2), **more) is model
try:
    ours(model, parallel_dims=NS(tp=4), **more)
except tpv.TPCompatError:
    assert upstream.calls == [model]
else:
    raise AssertionError("not refused")
tpv.install(); tpv.uninstall()
assert theirs is upstream.{function}  # a drop-in is independent of install()
"""


@pytest.mark.parametrize(
    ("fake", "wrapper", "name", "upstream"),
    [
        (fake_0_2, "llama3", "parallelize_llama", "models.llama3.infra.parallelize.parallelize_llama"),
        (fake_0_2, "llama4", "parallelize_llama", "models.llama4.infra.parallelize.parallelize_llama"),
        (fake_0_2, "qwen3", "parallelize_qwen3", "models.qwen3.infra.parallelize.parallelize_qwen3"),
        (fake_0_3, "llama3", "parallelize_llama", "models.llama3.parallelize.parallelize_llama"),
        (
            fake_0_3,
            "qwen3_5_moe",
            "parallelize_qwen3_5_moe",
            "models.qwen3_5.parallelize.parallelize_qwen3_5",
        ),
        (
            fake_fork,
            "qwen3_5_moe",
            "parallelize_qwen3_5_moe",
            "models.qwen3_5_moe.parallelize.parallelize_qwen3_5_moe",
        ),
        (fake_fork, "llama4", "parallelize_llama", "models.llama4.parallelize.parallelize_llama"),
    ],
)
def test_the_drop_in_stands_for_upstreams_function(tmp_path: Path, fake, wrapper, name, upstream) -> None:  # type: ignore[no-untyped-def]
    module, _, function = f"torchtitan.{upstream}".rpartition(".")
    code = USE.format(wrapper=wrapper, name=name, upstream=module, function=function)
    result = fake(tmp_path).run(code)
    assert result.returncode == 0, result.stderr
    if fake is not fake_fork:  # an unreleased checkout is warned of
        assert result.stderr == ""


def test_a_model_that_this_torchtitan_lacks_is_an_import_error_that_says_so(tmp_path: Path) -> None:
    result = fake_0_3(tmp_path).run("from torchtitan_tp_validate.wrappers.llama4 import parallelize_llama")
    assert result.stderr.splitlines()[-1] == (
        "ImportError: torchtitan 0.3.0 has no parallelize_llama: looked for parallelize_llama in "
        "torchtitan.models.llama4."
    )


def test_another_name_is_an_attribute_error(tmp_path: Path) -> None:
    result = fake_0_3(tmp_path).run("import torchtitan_tp_validate.wrappers.llama3 as m; m.parallelize_qwen3")
    assert "has no attribute 'parallelize_qwen3'" in result.stderr.splitlines()[-1]
