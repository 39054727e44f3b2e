from __future__ import annotations

from collections.abc import Iterator

import pytest

from torchtitan_tp_validate import notices


@pytest.fixture(autouse=True)
def _a_fresh_process() -> Iterator[None]:
    """What was said once in another test may be said again."""
    notices.forget()
    yield
    notices.forget()
