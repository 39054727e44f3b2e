from __future__ import annotations

import sys
from dataclasses import make_dataclass, replace
from types import SimpleNamespace

import pytest

from tests.core.shapes import told
from torchtitan_tp_validate.degrees import TOKEN_FIELDS, Degrees
from torchtitan_tp_validate.plan import PlanBuilder
from torchtitan_tp_validate.releases import releases
from torchtitan_tp_validate.releases.rows import backend_of, line_of, note_rows, note_sequence
from torchtitan_tp_validate.rules import RULES, Line

PADS = Degrees(tp=2, seq_len=64)
DTENSOR = replace(PADS, spmd_backend="full_dtensor")


def noted(degrees: Degrees, *, has_double: bool | None = None) -> PlanBuilder:
    findings = PlanBuilder(line_of(degrees))
    double = {} if has_double is None else {"has_double": has_double}
    note_rows(findings, degrees, "TP005", 6, layers=iter((1, 2)), **double)
    note_rows(findings, degrees, "TP012", 7, place="lm_head", label="rows", **double)
    return findings


def test_rows_are_even_where_they_are_padded_and_need_only_not_be_empty_elsewhere() -> None:
    assert (
        told(noted(PADS).dims(), 4)
        == told(noted(PADS, has_double=True).dims(), 4)
        == [
            "TP005 feed_forward_hidden_dim 6: even, in layers 1, 2 (2 of 4)",
            "TP012 rows 7: even, in lm_head",
        ]
    )
    not_empty = [
        "TP005 feed_forward_hidden_dim 6: not empty, in layers 1, 2 (2 of 4)",
        "TP012 rows 7: not empty, in lm_head",
    ]
    assert told(noted(DTENSOR).dims(), 4) == told(noted(DTENSOR, has_double=False).dims(), 4) == not_empty


def test_rows_beside_a_dimension_of_twice_the_size_are_cut_in_step() -> None:
    dims = noted(DTENSOR, has_double=True).dims()
    assert told(dims, 4) == [
        "TP005 feed_forward_hidden_dim 6: not empty, in layers 1, 2 (2 of 4)",
        "TP005 feed_forward_hidden_dim 6: in step, in layers 1, 2 (2 of 4)",
        "TP012 rows 7: not empty, in lm_head",
        "TP012 rows 7: in step, in lm_head",
    ]
    lines = (Line.DTENSOR, Line.DTENSOR_DOUBLED)
    assert [dim.otherwise for dim in dims[:2]] == [RULES["TP005"].otherwise[line] for line in lines]
    assert noted(PADS).dims()[0].otherwise == RULES["TP005"].otherwise[Line.SPMD_TYPES]


@pytest.mark.parametrize("field", TOKEN_FIELDS)
def test_the_sequence_is_named_as_the_loaded_torchtitan_names_it(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(TrainingConfig=make_dataclass("TrainingConfig", [field]))
    monkeypatch.setitem(sys.modules, "torchtitan.config", config)
    findings = PlanBuilder(Line.SPMD_TYPES)
    note_sequence(findings, PADS)
    (dim,) = findings.dims()
    assert told([dim], 4) == [f"TP009 {field} 64: even, in training.{field}"]
    assert dim.label == ("" if field == "seq_len" else field)


def test_a_backend_is_described_in_one_place() -> None:
    backends = {backend.name: backend for line in releases() for backend in line.SPMD_BACKENDS}
    assert [*backends] == ["spmd_types", "partial_dtensor", "full_dtensor"]
    assert {backend_of(Degrees(tp=2, spmd_backend=name)) for name in backends} == {*backends.values()}
    # The default of torchtitan 0.3.x, which `degrees` cannot ask.
    assert backend_of(Degrees(tp=2)) is backends["spmd_types"]
    unknown = backend_of(Degrees(tp=2, spmd_backend="next"))
    assert (unknown.pads_uneven_shards, unknown.shards_over_data_only) == (False, False)
