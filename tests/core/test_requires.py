from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import pytest_runtest_setup

INSTALLED = pytest.__version__


@pytest.mark.parametrize("required", [{"pytest": INSTALLED[:3]}, {"pytest": ("0.1", INSTALLED)}, {}])
def test_a_test_runs_where_one_of_the_releases_that_it_requires_is_installed(
    request: pytest.FixtureRequest, required: dict[str, Any]
) -> None:
    request.node.add_marker(pytest.mark.requires(**required))
    pytest_runtest_setup(request.node)


@pytest.mark.parametrize(
    ("required", "reason"),
    [
        ({"pytest": ("0.1", "0.2")}, f"requires pytest 0.1 or 0.2, installed is {INSTALLED}"),
        ({"pytest": INSTALLED, "not-there": "1.2"}, "requires not-there 1.2, installed is none"),
    ],
)
def test_a_test_is_skipped_where_none_of_them_is(
    request: pytest.FixtureRequest, required: dict[str, Any], reason: str
) -> None:
    request.node.add_marker(pytest.mark.requires(**required))
    with pytest.raises(pytest.skip.Exception) as skipped:
        pytest_runtest_setup(request.node)
    assert skipped.value.msg == reason
