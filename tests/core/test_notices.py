from __future__ import annotations

import warnings

from torchtitan_tp_validate import notices
from torchtitan_tp_validate.errors import NotValidatedWarning


def said(*calls: tuple[str, str, bool]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text, reason, audible in calls:
            notices.warn_once(text, reason, audible=audible)
    assert all(warning.category is NotValidatedWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def test_a_reason_is_given_once_whatever_the_words_around_it() -> None:
    assert said(("at startup: x", "x", True), ("x, again", "x", True), ("y", "y", True)) == [
        "at startup: x",
        "y",
    ]
    assert said(("x", "x", True)) == []
    notices.forget()
    assert said(("x", "x", True)) == ["x"]


def test_a_rank_for_which_another_speaks_does_not_repeat_it_either() -> None:
    assert said(("x", "x", False), ("x", "x", True)) == []
