"""Run mutmut with tests that are collected once: started anew, pytest takes longer than most mutants live."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from _pytest.config import _prepareconfig
from _pytest.main import Session
from _pytest.nodes import Item
from _pytest.runner import runtestprotocol
from mutmut import __main__ as mutmut
from mutmut.configuration import config
from mutmut.runners.harness import PytestRunner
from mutmut.utils.file_utils import change_cwd
from mutmut.workers import isolation


class CollectedOnce(PytestRunner):  # type: ignore[misc]  # not installed where types are checked
    """Runs collected tests in a process that is forked from the one that collected them."""

    items: dict[str, Item] | None = None

    def collect(self) -> dict[str, Item]:
        """Return every test by its name."""
        arguments = ["--rootdir=.", "--capture=no", "--tb=native", *config().pytest_add_cli_args]
        prepared = _prepareconfig([*arguments, *config().pytest_add_cli_args_test_selection])
        prepared._do_configure()
        session = Session.from_config(prepared)
        prepared.hook.pytest_sessionstart(session=session)
        return {item.nodeid: item for item in session.perform_collect() if isinstance(item, Item)}

    def run_tests(self, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        """Return 1 when a test fails, else 0."""
        with change_cwd("mutants"):
            if self.items is None:
                self.items = self.collect()
            _forget()
            for test in tests or self.items:
                reports = runtestprotocol(self.items[test], log=False, nextitem=None)
                if any(report.failed for report in reports):
                    return 1
        return 0

    def run_forced_fail(self) -> int:
        """Return what the tests do when every function fails."""
        return self.run_tests(mutant_name=None, tests=[])


def _forget() -> None:
    """Empty the package's caches: what an earlier test has filled would hide a mutant."""
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan_tp_validate"):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


if __name__ == "__main__":
    isolation.PytestRunner = CollectedOnce
    mutmut.run.main(["--max-children", "1", *sys.argv[1:]], prog_name="mutation")
