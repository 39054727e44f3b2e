"""What the tests on real ranks have in common: all cases that the selected ones name run in one torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.forked import in_forks
from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.models import installed_line
from torchtitan_tp_validate.rehearsal.runner import Result, run_cases
from torchtitan_tp_validate.rehearsal.torchrun import Torchrun, run_torchrun

ROOT = Path(__file__).resolve().parents[2]
ResultOf = Callable[[Case], Result]


_TOGETHER = {"result_of": "cases", "line": "recorded"}
"""Fixture -> the xdist group of the tests that use it, so that it is made once."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep together what shares a torchrun, the verdicts on a recorded truth, or a process that forks."""
    for item in items:
        if isinstance(item, pytest.Function) and item.path.is_relative_to(Path(__file__).parent):
            used = [group for fixture, group in _TOGETHER.items() if fixture in item.fixturenames]
            for group in used[:1]:
                item.add_marker(pytest.mark.xdist_group(group))
            if item.path.stem.endswith("_launcher"):
                item.add_marker(in_forks)


def run_ranks(module: str, *arguments: str, nproc: int, folder: Path, timeout: float = 400.0) -> Torchrun:
    """Run a module of the tests under torchrun, from a folder that holds nothing else."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    where = {"out": folder, "cwd": folder, "env": {"PYTHONPATH": path}}
    return run_torchrun(arguments, nproc=nproc, timeout=timeout, module=module, **where)


@pytest.fixture(scope="session")
def line() -> ModuleType:
    """The installed line, its models ready to be built in this process."""
    found = installed_line()
    found.prepare("cpu")
    return found


@pytest.fixture(scope="session")
def result_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ResultOf:
    """How each case of ``CASES`` in the selected tests' modules ended, all from one torchrun."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    modules = dict.fromkeys(item.module for item in items if "result_of" in item.fixturenames)
    cases = {case.key: case for module in modules for case in module.CASES}
    results: dict[str, Result] = {}

    def done(result: Result) -> None:
        results[result.case.key] = result

    run_cases(cases.values(), tmp_path_factory.mktemp("cases"), done=done)
    return lambda case: results[case.key]
