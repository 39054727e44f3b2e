from __future__ import annotations

from torchtitan_tp_validate.degrees import Axis
from torchtitan_tp_validate.plan import ShardedDim, Split
from torchtitan_tp_validate.rules import LINES, RULES, Line, Otherwise


def test_every_rule_names_its_dimension_its_reason_and_its_source() -> None:
    for code, rule in RULES.items():
        assert rule.code == code
        assert rule.dim.isidentifier()
        assert Axis(rule.axis)
        assert rule.why
        assert not rule.why.endswith(".")
        assert "torchtitan" in rule.source
        assert rule.instead
        assert not rule.instead.endswith(".")


def told(otherwise: Otherwise) -> list[str]:
    return [otherwise.short, otherwise.text]


def test_data_holds_no_layout() -> None:
    for rule in RULES.values():
        texts = [rule.dim, rule.why, rule.instead, rule.source, rule.scope]
        for text in [*texts, *(text for value in rule.otherwise.values() for text in told(value))]:
            assert text == " ".join(text.split())


def test_every_rule_says_what_happens_otherwise_wherever_it_refuses_something() -> None:
    for rule in RULES.values():
        assert set(rule.otherwise) & set(LINES)
        for line, otherwise in rule.otherwise.items():
            assert otherwise.short
            # 0.3.x splits the sequence unevenly behind DTensor.
            assert otherwise.text.endswith(".") or (rule.code, line) == ("TP009", Line.DTENSOR)
            assert otherwise.silent is ("SILENTLY" in otherwise.text)


def test_what_two_lines_do_alike_is_said_once() -> None:
    assert list(RULES["TP002"].in_short.values()) == [
        "dies in forward",
        "first layer refused late, later ones die",
        "the same",
    ]
    assert list(RULES["TP007"].in_short.values()) == ["", "dies with images", "the same"]


def test_the_example_of_a_rule_is_so() -> None:
    special = {"TP013": {"split": Split.ALIGNED}, "TP015": {"multiple": 16}}
    for code, rule in RULES.items():
        otherwise = next(iter(rule.otherwise.values()))
        dim = ShardedDim(code, rule.example.size, (0,), otherwise, **special.get(code, {}))
        assert dim.allows(rule.example.works)
        assert not dim.allows(rule.example.fails)
