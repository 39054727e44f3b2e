"""Which parallelize functions of somebody's own can be judged, told by their source."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchtitan_tp_validate.locate import module_file
from torchtitan_tp_validate.shape import is_own, own_entry_points, own_name

PLAN = """
def parallelize_mine(model, parallel_dims, job_config):
    parallelize_module(model, parallel_dims.get_mesh("tp"), {plan})
"""
BY_COLUMNS = '{"attention.wq": ColwiseParallel(), "attention.wk": ColwiseParallel()}'
Packages = Callable[[dict[str, str]], None]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    """Writes packages, by file, of which each test has its own."""

    def write(sources: dict[str, str]) -> None:
        for name, source in sources.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            (file.parent / "__init__.py").touch()
            file.write_text(source, encoding="utf-8")
        for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(tmp_path)
    return write


@pytest.mark.parametrize(
    ("source", "is_known"),
    [
        (PLAN.format(plan=BY_COLUMNS), True),
        (PLAN.format(plan='{"self_attn.k_proj": colwise()}'), True),
        # Whoever keeps keys and values whole may have any number of their heads.
        (PLAN.format(plan='{"attention.wq": ColwiseParallel(), "attention.wk": NoParallel()}'), False),
        (PLAN.format(plan='{"feed_forward.w1": ColwiseParallel()}'), False),
        (PLAN.format(plan="make_plan(model)"), False),
        (
            "def parallelize_mine(model, *, parallel_dims, **how):\n    model.parallelize(parallel_dims)\n",
            True,
        ),
        ("def parallelize_mine(model, **how):\n    model.parallelize(how['parallel_dims'])\n", True),
        ("def parallelize_mine(model, mesh):\n    model.parallelize(mesh)\n", False),
        (
            "def parallelize_mine(model, parallel_dims):\n    return AutoParallel(model, parallel_dims)\n",
            False,
        ),
    ],
)
def test_it_is_known_by_its_parameters_and_by_what_it_splits(
    packages: Packages, source: str, is_known: bool
) -> None:
    packages({"mine/infra/parallelize.py": source, "mine/__init__.py": ""})
    found = [str(point) for point in own_entry_points("mine")]
    assert found == ["mine.infra.parallelize.parallelize_mine"] * is_known
    assert is_own(importlib.import_module("mine.infra.parallelize").parallelize_mine) is is_known


@pytest.mark.parametrize(
    ("taken", "is_known"),
    [
        ("from .plans import apply_non_moe_tp as split", True),
        ("from mine.plans import parallelize_theirs", True),
        ("from mine import plans\n\ndef f():\n    plans.parallelize_theirs()", True),
        ("from . import plans\n\ndef f():\n    plans.parallelize_theirs()", True),
        ("from mine.plans import apply_fsdp", False),
        ("from mine import plans", False),
        ("from .nowhere import apply_tp", False),
    ],
)
def test_it_is_known_by_what_it_hands_on_to(packages: Packages, taken: str, is_known: bool) -> None:
    sources = {"mine/__init__.py": "", "mine/plans.py": f"from .parallelize import *\nplan = {BY_COLUMNS}\n"}
    function = "def parallelize_mine(model, parallel_dims): ...\n"
    packages(sources | {"mine/parallelize.py": f"{taken}\n\n{function}"})
    assert [point.function for point in own_entry_points("mine")] == ["parallelize_mine"] * is_known


def test_a_table_goes_before_a_shape() -> None:
    def parallelize_llama(model: Any, parallel_dims: Any) -> None: ...

    for module in ("torchtitan.models.llama3.parallelize", "torchtitan.models.flux.parallelize"):
        parallelize_llama.__module__ = module
        assert not is_own(parallelize_llama)
    assert not is_own(len)
    assert list(own_entry_points("no.such.package")) == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torchtitan.models.mine.infra.parallelize", "mine"),
        ("torchtitan.experiments.mine.llama3.parallelize", "mine.llama3"),
        ("mine", "mine"),
    ],
)
def test_a_model_is_called_as_its_package(module: str, name: str) -> None:
    assert own_name(module) == name


def test_a_script_has_a_source_and_what_is_typed_in_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module_file(__name__) == Path(__file__)
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    assert module_file("__main__") is None
