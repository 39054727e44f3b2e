from __future__ import annotations

import pytest

import torchtitan_tp_validate as tpv
from torchtitan_tp_validate.releases.reading import head_count, shortened


@pytest.mark.parametrize(
    ("length", "shown"), [(80, "a" * 78), (81, "a" * 76 + "..."), (200, "a" * 76 + "...")]
)
def test_a_value_is_shown_in_one_line_of_at_most_80_characters(length: int, shown: str) -> None:
    text = shortened("a" * (length - 2))
    assert text == ("'" + shown + ("" if shown.endswith("...") else "'"))
    assert len(text) == 80


def test_a_value_that_cannot_be_shown_says_why() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise ZeroDivisionError

    assert shortened(Broken()) == "a value that cannot be shown (ZeroDivisionError)"
    assert shortened("a\nb") == "'a\\nb'"


def test_a_million_heads_are_believed_and_one_more_is_not() -> None:
    assert head_count(1_000_000, "n_heads") == 1_000_000
    with pytest.raises(tpv.PlanError, match=r"n_heads must be at most 1000000, got 1000001\."):
        head_count(1_000_001, "n_heads")
