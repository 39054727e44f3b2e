from __future__ import annotations

from torchtitan_tp_validate.degrees import Axis
from torchtitan_tp_validate.rules import RULES


def test_every_rule_names_its_dimension_its_reason_and_its_source() -> None:
    for code, rule in RULES.items():
        assert rule.code == code
        assert rule.dim.isidentifier()
        assert Axis(rule.axis)
        assert rule.why
        assert not rule.why.endswith(".")
        assert "torchtitan" in rule.source
