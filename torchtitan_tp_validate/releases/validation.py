"""What the data loaders of a job feed its model with, and what its validator does otherwise than the Trainer.

Source: ``components/validate.py`` of torchtitan 0.2.0 to 0.3.0 and main.
"""

from __future__ import annotations

from typing import Any

from torchtitan_tp_validate.degrees import FLAGS, Degrees
from torchtitan_tp_validate.layout import Validation
from torchtitan_tp_validate.releases.sources import Source, source_of

_FILE = "components/validate.py"
_ASKS_FOR_FREQUENCIES = Source(_FILE, "[m.freqs_cis for m in model_parts]")
_MAKES_MASKS = Source(_FILE, ").get_attention_masks(")
_COUNTS_PARTS = Source(_FILE, "# Count valid tokens for this batch local_valid_tokens")
"""Of 0.2.2: context parallelism has cut the labels by then, and the count is summed over data ranks alone."""

_TAKES_TENSORS = Source(_FILE, "for k, v in input_dict.items(): input_dict[k] = v.to(device_type)")
_TAKES_NO_MASKS = Source("models/llama4/model/model.py", "assert attention_masks is None and self.attn_type")


_OF_TEXT = "TextCollator.Config"
_OF_IMAGES = ("MMDataLoader.Config", "MultiModalCollator.Config")
"""What puts batches together: in 0.3.x the data loader, in main its collator."""


def is_of_text(loader: Any) -> bool:
    """Return whether a data loader has no images, as far as that is known: by its class, or collator."""
    source = _source(loader)
    return source.__module__ == "torchtitan.hf_datasets.text_datasets" or source.__qualname__ == _OF_TEXT


def _source(loader: Any) -> type:
    return type(getattr(loader, "collator", loader))


def read_validator(job: Any, asks: str, *, in_a_row: bool) -> Validation:
    """Return what a ``Trainer.Config`` says of its validation.

    Args:
        job: the ``Trainer.Config``.
        asks: what its model asks for that batches of text lack, or empty.
        in_a_row: whether the job is one of main's.
    """
    section = getattr(job, "validator", None)
    if not getattr(section, "enable", False):
        return Validation()
    loader, stopped_by = getattr(section, "dataloader", None), ""
    if _source(loader).__qualname__ in _OF_IMAGES and _TAKES_TENSORS.is_installed:
        stopped_by = "the validator takes batches of tensors alone, and those with images have more in them"
    elif asks and is_of_text(loader):
        stopped_by = f"the model asks for {asks}, which the validator's batches lack"
    # Main refuses it itself.
    to_the_end = not in_a_row and getattr(section, "steps", None) == -1
    return Validation("validator.steps" if to_the_end else "", stopped_by)


def read_validation(job: Any, spec: Any, config: Any, degrees: Degrees) -> Validation:
    """Return what a ``JobConfig`` says of its validation.

    Args:
        job: the ``JobConfig``.
        spec: the ``TrainSpec`` of its model, or None.
        config: the model's args.
        degrees: those of the run.
    """
    section = job.validation
    if not section.enable:
        return Validation()
    return Validation(
        "validation.steps" if section.steps == -1 else "",
        "" if spec is None else _stopped_by(spec, config, degrees),
        section.local_batch_size,
        degrees.cp > 1 and _COUNTS_PARTS.is_installed,
    )


def _stopped_by(spec: Any, config: Any, degrees: Degrees) -> str:
    """Return why torchtitan's validator of 0.2.x cannot run a model, or nothing."""
    if spec.build_validator_fn is None:
        return "the model has no validator"
    if spec.build_validator_fn.__module__ != "torchtitan.components.validate":
        return ""
    masked = getattr(config, "use_flex_attn", False) or getattr(config, "attn_type", "") in ("flex", "varlen")
    if masked and not _MAKES_MASKS.is_installed:
        return "the validator makes no masks, which the model's attention needs"
    of_llama4 = spec.model_cls.__module__.startswith("torchtitan.models.llama4.")
    if not masked and of_llama4 and _MAKES_MASKS.is_installed and _TAKES_NO_MASKS.is_installed:
        return "the validator makes masks, which the model's attention takes none of"
    if degrees.cp > 1 and _ASKS_FOR_FREQUENCIES.is_installed and _lacks_frequencies(spec.model_cls):
        return (
            f"{FLAGS['cp']} is {degrees.cp}, and the validator asks the model for freqs_cis, which it does "
            "not have"
        )
    return ""


def _lacks_frequencies(model_cls: type) -> bool:
    """Return whether neither a model nor what it extends registers ``freqs_cis``, by their sources."""
    sources = [source_of(base) for base in model_cls.__mro__ if base is not object]
    return all(sources) and not any('"freqs_cis"' in source for source in sources)
