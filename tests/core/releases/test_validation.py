"""The validators of made jobs; tests/rehearsal/test_validation.py has those of torchtitan's models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.layout import Validation
from torchtitan_tp_validate.releases import validation
from torchtitan_tp_validate.releases.sources import Source
from torchtitan_tp_validate.releases.validation import read_validation

THEIRS = "torchtitan.components.validate"
ONE, CP = Degrees(tp=1), Degrees(tp=1, cp=2)


class Turned:
    """A model with frequencies."""

    buffers = ("freqs_cis",)


class Extended(Turned):
    """A model that extends it."""


class Still:
    """A model without."""


@pytest.fixture(autouse=True)
def _of_0_2_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece of source that is asked for is there, as in 0.2.2."""
    monkeypatch.setattr(Source, "is_installed", True)


def stopped_by(model_cls: type, degrees: Degrees = ONE, *, of: str | None = THEIRS, **args: Any) -> str:
    """Why the validator of a job cannot run a model."""
    build = None if of is None else type("build_validator", (), {"__module__": of})
    spec = SimpleNamespace(model_cls=model_cls, build_validator_fn=build)
    section = SimpleNamespace(enable=True, steps=5, local_batch_size=8)
    job = SimpleNamespace(validation=section)
    return read_validation(job, spec, SimpleNamespace(**args), degrees).stopped_by


def test_a_job_says_how_it_validates() -> None:
    section = SimpleNamespace(enable=True, steps=-1, local_batch_size=6)
    job = SimpleNamespace(validation=section)
    assert read_validation(job, None, None, CP) == Validation("validation.steps", "", 6, counts_parts=True)
    assert read_validation(job, None, None, ONE) == Validation("validation.steps", "", 6)
    section.enable = False
    assert read_validation(job, None, None, CP) == Validation()


def test_a_model_without_a_validator_or_with_one_of_its_own_is_told_apart() -> None:
    assert stopped_by(Still, of=None) == "the model has no validator"
    assert stopped_by(Still, CP, of="somebody.elses") == ""


def test_a_validator_asks_a_model_for_its_frequencies_under_context_parallelism() -> None:
    asked = (
        "context_parallel_degree is 2, and the validator asks the model for freqs_cis, which it does not have"
    )
    assert stopped_by(Still, CP) == asked
    assert stopped_by(Still) == ""
    assert stopped_by(Turned, CP) == stopped_by(Extended, CP) == ""
    # Its source is nowhere.
    assert stopped_by(type("Made", (), {}), CP) == ""


def test_masks_are_made_for_attention_that_takes_them_and_for_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llama4 = type("Llama4", (), {"__module__": "torchtitan.models.llama4.model.model"})
    takes_none = "the validator makes masks, which the model's attention takes none of"
    needs = "the validator makes no masks, which the model's attention needs"
    flex: tuple[dict[str, Any], ...] = (
        {"attn_type": "flex"},
        {"attn_type": "varlen"},
        {"use_flex_attn": True},
    )
    assert stopped_by(llama4, attn_type="sdpa") == takes_none
    assert [stopped_by(llama4, **args) for args in flex] == [""] * 3
    assert stopped_by(Turned, attn_type="sdpa") == ""
    monkeypatch.setattr(Source, "is_installed", False)
    assert [stopped_by(llama4, **args) for args in flex] == [needs] * 3
    assert stopped_by(llama4, attn_type="sdpa") == ""


def test_what_puts_batches_together_tells_whether_they_are_of_text() -> None:
    text = type("Config", (), {"__module__": "torchtitan.hf_datasets.text_datasets"})()
    collated = SimpleNamespace(collator=type("TextCollator.Config", (), {})())
    collated.collator.__class__.__qualname__ = "TextCollator.Config"
    assert validation.is_of_text(text)
    assert validation.is_of_text(collated)
    assert not validation.is_of_text(SimpleNamespace())
