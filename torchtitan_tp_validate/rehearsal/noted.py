"""Note which stand-ins are used: what was not run is never implied."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def note(function: Callable[..., Any], name: str, used: set[str]) -> Callable[..., Any]:
    """Return a function that puts ``name`` into ``used`` whenever it is called."""

    @functools.wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        used.add(name)
        return function(*args, **kwargs)

    return noted
