from __future__ import annotations

import pytest

from tests.conftest import pytest_runtest_setup

INSTALLED = pytest.__version__


def test_a_test_is_skipped_where_none_of_the_releases_that_it_requires_is_installed(
    request: pytest.FixtureRequest,
) -> None:
    request.node.add_marker(pytest.mark.requires(pytest=INSTALLED[:3]))
    request.node.add_marker(pytest.mark.requires(pytest=("0.1", INSTALLED)))
    pytest_runtest_setup(request.node)
    request.node.add_marker(pytest.mark.requires(pytest=("0.1", "0.2")))
    with pytest.raises(
        pytest.skip.Exception, match=f"^requires pytest 0.1 or 0.2, installed is {INSTALLED}$"
    ):
        pytest_runtest_setup(request.node)
