from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import pytest

from torchtitan_tp_validate import notices
from torchtitan_tp_validate.identity import torchtitan_identity


def pytest_collection_finish(session: pytest.Session) -> None:
    """Say so where xdist has not seen the groups, so that each worker makes what they share."""
    if getattr(session.config.option, "loadgroup", False):
        grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
        if any("@" not in item.nodeid for item in grouped):
            warnings.warn(
                "xdist does not see the groups of tests in this pytest: take pytest<9.2", stacklevel=1
            )


@pytest.hookimpl(tryfirst=True)  # before any fixture is made
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that requires another release than the installed, e.g. ``requires(torchtitan="0.3")``."""
    for marker in item.iter_markers("requires"):
        for package, releases in marker.kwargs.items():
            installed = _installed(package)
            if not installed.startswith(releases):
                names = releases if isinstance(releases, str) else " or ".join(releases)
                pytest.skip(f"requires {package} {names}, installed is {installed}")


def _installed(package: str) -> str:
    if package == "torchtitan":
        return torchtitan_identity().name
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@pytest.fixture(autouse=True)
def _a_fresh_process() -> Iterator[None]:
    """What was said once in another test may be said again."""
    notices.forget()
    yield
    notices.forget()
