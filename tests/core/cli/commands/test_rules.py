"""``rules`` and ``rule``."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.core.cli.conftest import Program
from torchtitan_tp_validate.rules import FAULTS, RULES, RUN_RULES


def test_every_rule_is_listed_and_explained(tp_validate: Program) -> None:
    status, out, _ = tp_validate("rules")
    assert (status, [line.split()[0] for line in out.splitlines()]) == (0, [*RULES, *RUN_RULES, *FAULTS])
    for code, rule in RULES.items():
        status, out, _ = tp_validate("rule", code.lower())
        assert status == 0
        assert out.startswith(f"{code}: {rule.dim}\n")
        assert rule.why in out
        assert out.endswith(f"\nSource: {rule.source}\n")
        assert all(told in out for told in rule.in_short.values())
    for code, run_rule in {**RUN_RULES, **FAULTS}.items():
        status, out, _ = tp_validate("rule", code)
        assert status == 0
        assert out.startswith(f"{code}: {run_rule.about}\n")
        assert run_rule.must[1:] in out
        assert all(told in out for told in run_rule.in_short.values())


def test_a_rule_in_full(tp_validate: Program) -> None:
    assert tp_validate("rule", "TP002").out == (
        "TP002: n_kv_heads\n\n"
        "The tensor parallel degree must fit n_kv_heads: wk and wv are split by columns, so that every rank "
        "computes whole key-value heads.\n\n"
        "When it does not, and nobody checks:\n"
        "  torchtitan 0.2.x:         dies in forward\n"
        "  0.3.x, spmd_types:        first layer refused late, later ones die\n"
        "  0.3.x, DTensor backends:  the same\n\n"
        "Source: torchtitan models/*/parallelize.py; https://github.com/pytorch/torchtitan/issues/2574\n"
    )


def schema(name: str) -> Any:
    return json.loads(resources.files("torchtitan_tp_validate.cli").joinpath(name).read_text())


def test_rules_as_json(tp_validate: Program, tmp_path: Path) -> None:
    every = json.loads(tp_validate("rules", "--output-format", "json").out)
    jsonschema.validate(every, schema("schema-rules.json"))
    assert [rule["code"] for rule in every["rules"]] == list(RULES)
    assert [rule["code"] for rule in every["run_rules"]] == [*RUN_RULES, *FAULTS]
    target = tmp_path / "rule.json"
    assert tp_validate("rule", "tp002", "--output-format", "json", "--output-file", target).status == 0
    one = json.loads(target.read_text())
    jsonschema.validate(one, schema("schema-rules.json"))
    assert one["rules"] == [every["rules"][list(RULES).index("TP002")]]
    assert one["rules"][0]["ignored"]["torchtitan 0.2.x"] == "dies in forward"


@pytest.mark.parametrize("word", ["TP02", "tp2", "2", "TP-002", "tp_2"])
def test_a_code_that_is_nearly_right_is_suggested(tp_validate: Program, word: str) -> None:
    line = f"tp-validate rule: argument CODE: there is no '{word}'; did you mean TP002?\n"
    assert tp_validate("rule", word) == (2, "", f"{line}Try 'tp-validate rule --help'.\n")
    assert "did you mean EP001?" in tp_validate("rule", "EP1").err
    assert "choose from TP001, " in tp_validate("rule", "xyz").err
