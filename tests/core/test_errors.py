from __future__ import annotations

import pickle
import re

import pytest

import torchtitan_tp_validate as tpv
from tests.core.shapes import attention_layer, config_tree, delta_layer, model_args
from torchtitan_tp_validate.errors import Refusal, Violation
from torchtitan_tp_validate.rules import RULES

TEXT_0_3 = """\
Tensor parallel degree (4) must divide n_kv_heads (2). For Qwen3.5-MoE, max supported TP is 2.

  TP002 n_kv_heads = 2 is not a multiple of 4, in layers 1, 3 (2 of 4):
        wk and wv are split by columns, so that every rank computes whole key-value heads.
  TP001 n_heads = 6 is not a multiple of 4, in layers 1, 3 (2 of 4):
        wq is split by columns and wo by rows, so that every rank computes whole query heads.

Without this check: torchtitan looks at the first such layer only, and not before the process groups
  are up; any other one kills the first forward pass with
  "shape '[...]' is invalid for input of size ...".
Degrees that work: 1, 2.
To change it: --parallelism.tensor_parallel_degree 2, or in the config registry:
  parallelism=ParallelismConfig(tensor_parallel_degree=2)"""

TEXT_0_2 = """\
Tensor parallel degree (16) must divide n_kv_heads (8). For Llama 3, max supported TP is 8.

  TP002 n_kv_heads = 8 is not a multiple of 16, in all 32 layers:
        wk and wv are split by columns, so that every rank computes whole key-value heads.

Without this check: the run starts, and its first forward pass dies in attention with
  "shape '[...]' is invalid for input of size ..." or "Cannot unflatten unevenly sharded tensor".
Degrees that work: 1, 2, 4, 8.
To change it: --parallelism.tensor_parallel_degree 8, or in the job's TOML file:
  [parallelism]
  tensor_parallel_degree = 8"""


def refusal(model: object, tp: int, name: str | None = None) -> tpv.TPCompatError:
    with pytest.raises(tpv.TPCompatError) as caught:
        tpv.validate_tp_compat(model, tp, model_name=name)
    return caught.value


def qwen35() -> object:
    return config_tree(delta_layer(), attention_layer(6, 2), delta_layer(), attention_layer(6, 2))


def test_the_full_text_for_a_0_3_config() -> None:
    assert str(refusal(qwen35(), 4, "Qwen3.5-MoE")) == TEXT_0_3


def test_the_full_text_for_0_2_model_args() -> None:
    assert str(refusal(model_args(32, 8, 32), 16, "Llama 3")) == TEXT_0_2


def test_the_data_holds_no_layout() -> None:
    for error in (refusal(qwen35(), 4), refusal(model_args(32, 8, 32), 16)):
        for violation in error.violations:
            assert violation.consequence == " ".join(violation.consequence.split())


def test_a_message_that_is_quoted_is_in_one_line_to_be_searched_for() -> None:
    for rule in RULES.values():
        for otherwise in rule.otherwise.values():
            violation = Violation("TP002", "n", 2, 4, "x", (0,), "y", "z", otherwise.text)
            text = Refusal((violation,), [1], [], "headline", "advice").text
            shown = text.partition("Without this check: ")[2].partition("\nadvice")[0]
            assert " ".join(shown.split()) == otherwise.text
            assert all(quoted in text for quoted in re.findall('"[^"]*"', otherwise.text))
            assert max(map(len, text.splitlines())) <= 103


def test_the_refusal_is_data_too() -> None:
    error = refusal(qwen35(), 4, "Qwen3.5-MoE")
    assert isinstance(error, ValueError)
    assert (error.tp, error.model, error.valid_degrees) == (4, "Qwen3.5-MoE", [1, 2])
    assert [(v.code, v.dim, v.size, v.layers) for v in error.violations] == [
        ("TP002", "n_kv_heads", 2, (1, 3)),
        ("TP001", "n_heads", 6, (1, 3)),
    ]


def test_the_text_fits_a_terminal() -> None:
    assert max(map(len, str(refusal(qwen35(), 64, "Qwen3.5-MoE")).splitlines())) <= 100


def test_what_could_not_be_read_is_data_and_text_and_survives_pickling() -> None:
    with pytest.raises(tpv.PlanError) as caught:
        tpv.validate_tp_compat(model_args(n_layers=0), 2)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert error.reason == "SimpleNamespace.n_layers must be a positive whole number, got 0."
        assert str(error) == f"Not validated: {error.reason}"


def test_a_refusal_survives_pickling_between_processes() -> None:
    error = refusal(qwen35(), 4)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is tpv.TPCompatError
    assert str(copy) == str(error)
    assert copy.violations == error.violations
    assert copy.valid_degrees == error.valid_degrees


def test_the_suggested_degree_is_the_largest_that_works_below_the_one_asked_for() -> None:
    assert "tensor_parallel_degree 4," in str(refusal(model_args(32, 8), 6))
    assert "tensor_parallel_degree 1," in str(refusal(model_args(7, 7), 2))
