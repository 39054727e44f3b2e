from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import pytest

from torchtitan_tp_validate import notices


@pytest.hookimpl(tryfirst=True)  # before any fixture is made
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that requires another release than the installed, e.g. ``requires(torchtitan="0.3")``."""
    for marker in item.iter_markers("requires"):
        for package, releases in marker.kwargs.items():
            installed = version(package)
            if not installed.startswith(releases):
                names = releases if isinstance(releases, str) else " or ".join(releases)
                pytest.skip(f"requires {package} {names}, installed is {installed}")


@pytest.fixture(autouse=True)
def _a_fresh_process() -> Iterator[None]:
    """What was said once in another test may be said again."""
    notices.forget()
    yield
    notices.forget()
