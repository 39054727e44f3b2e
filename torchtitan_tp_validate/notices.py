"""Say once in a process that something was let through without a verdict.

A run is looked at several times (by the launcher, as the Trainer starts, as each of its parts is
parallelized), and would say the same each time.
"""

from __future__ import annotations

import warnings

from torchtitan_tp_validate.errors import NotValidatedWarning

_said: set[str] = set()


def warn_once(
    text: str, reason: str, *, audible: bool = True, category: type[UserWarning] = NotValidatedWarning
) -> None:
    """Warn, unless the reason was given before.

    Args:
        reason: what is told once, whatever the words around it.
        audible: whether this rank is the one to speak; where not, the reason counts as given all the same.
        category: the kind of warning.
    """
    if reason in _said:
        return
    _said.add(reason)
    if audible:
        warnings.warn(text, category, stacklevel=3)


def forget() -> None:
    """Begin anew, as in a fresh process."""
    _said.clear()
