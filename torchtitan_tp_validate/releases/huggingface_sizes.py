"""What torchtitan splits of a Hugging Face config beside the heads of its text decoder.

Heads are split whole in every model, so that they can be judged in any. Hidden sizes, the vocabulary and a
vision encoder are split by torchtitan's own model of a family, and are judged where it has one; of another
family it is only said that its vision or audio part was not looked at. Experts are split by every expert
parallel run.

Source: ``models/*/sharding.py`` and ``models/common/*_sharding.py`` of torchtitan 0.3.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.models import hf_model_types
from torchtitan_tp_validate.plan import PlanBuilder
from torchtitan_tp_validate.releases.experts import Experts, note_experts
from torchtitan_tp_validate.releases.key_value_heads import found
from torchtitan_tp_validate.releases.reading import head_count, whole_number
from torchtitan_tp_validate.releases.rows import note_rows, note_sequence

_N_EXPERTS = (
    "n_routed_experts",
    "num_experts",
    "num_local_experts",
    "moe_num_experts",
    "num_routed_experts",
    "n_experts",
)
_NOT_TEXT = ("vision", "visual", "vit", "audio", "speech")
_VISION_HEADS = ("num_heads", "num_attention_heads", "vt_num_attention_heads")
_VISION_HIDDEN = ("intermediate_size", "vt_intermediate_size")
_VISION_DIM = ("hidden_size", "vt_hidden_size")
_MERGED = ("spatial_merge_size", "merge_kernel_size")

_MOST_ROWS = 10**9


def note_sizes(
    findings: PlanBuilder,
    config: Mapping[str, Any],
    parts: Sequence[tuple[Mapping[str, Any], str]],
    degrees: Degrees,
) -> Iterator[str]:
    """Note what is split beside heads, and yield what was not judged for want of a value.

    Args:
        findings: where to note it.
        config: the whole file.
        parts: its text decoders, each with its path and a dot.
        degrees: of the run.

    Raises:
        PlanError: a size is not a positive whole number.
    """
    note_sequence(findings, degrees)
    if degrees.cp > 1 and degrees.seq_len is None:
        yield f"TP009: no seq_len was given to be split over {degrees.cp} context parallel ranks"
    if degrees.ep > 1 and not sum(_note_num_experts(findings, part, where) for part, where in parts):
        yield "EP001: the config has no number of experts"
    model_type = config.get("model_type")
    has_model = isinstance(model_type, str) and model_type in hf_model_types()
    if has_model:
        for part, where in parts:
            missing = _Sizes(findings, part, where, degrees).note_text()
            if missing:
                codes, names = zip(*missing, strict=True)
                yield f"{', '.join(codes)}: the config has no {where}{f', {where}'.join(names)}"
    for name in _other_parts(config):
        if has_model and name == "vision_config":
            yield from _Sizes(findings, config[name], f"{name}.", degrees).note_vision()
        else:
            yield f"{name}: not looked at"


def _other_parts(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the parts of a config that are no text decoder, of its first two levels."""
    return [
        f"{where}{name}"
        for where, level in (("", config), ("thinker_config.", config.get("thinker_config")))
        if isinstance(level, Mapping)
        for name, value in level.items()
        if isinstance(name, str) and isinstance(value, Mapping) and name.startswith(_NOT_TEXT)
        if len(name) <= 40 and name.isidentifier()
    ]


def _note_num_experts(findings: PlanBuilder, config: Mapping[str, Any], where: str) -> bool:
    """Note the number of routed experts, and return whether there are any."""
    experts = _num_experts(config)
    if experts is None:
        return False
    name, value = experts
    for count in value if isinstance(value, (list, tuple)) else (value,):  # some have a number per layer
        findings.add("EP001", _rows(count, f"{where}{name}"), place=_place(where), label=name)
    return True


def _num_experts(config: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return the name and number of a model's experts; a dense model may say that it has none, or one."""
    experts = found(config, _N_EXPERTS)
    return None if experts is None or experts[1] in (0, 1) else experts


class _Sizes:
    """The sizes of one part of a config."""

    def __init__(
        self, findings: PlanBuilder, config: Mapping[str, Any], where: str, degrees: Degrees
    ) -> None:
        self._findings = findings
        self._config = config
        self._where = where
        self._degrees = degrees

    def note_text(self) -> list[tuple[str, str]]:
        """Note the sizes of a text decoder, and return the rule code and the name of what is missing."""
        config = self._config
        has_experts = _num_experts(config) is not None
        missing = [self._note("TP006", "vocab_size")]
        if not has_experts or self._has_dense_layers():
            missing.append(self._note("TP005", "intermediate_size"))
        if has_experts:
            # gpt_oss has no dense layers, and no other name for the hidden size of its experts.
            hidden = found(config, ("moe_intermediate_size", "intermediate_size"))
            if hidden is None:
                missing.append(("TP011", "moe_intermediate_size"))
            else:
                self._note_experts(*hidden)
                missing.append(self._note_shared_experts(hidden[1]))
        return [name for name in missing if name is not None]

    def note_vision(self) -> Iterator[str]:
        """Note the heads and sizes of a vision encoder, and yield what is missing."""
        config, where = self._config, self._where
        heads = found(config, _VISION_HEADS)
        if heads is None:
            yield f"TP007: {where.rstrip('.')} has no number of heads"
            return
        count = head_count(heads[1], f"{where}{heads[0]}")
        self._findings.add("TP007", count, place=where.rstrip("."), label=f"{where}{heads[0]}")
        hidden = found(config, _VISION_HIDDEN)
        if hidden is not None:
            self._rows_of("TP008", _rows(hidden[1], f"{where}{hidden[0]}"), f"{where}{hidden[0]}")
        dim, merged = found(config, _VISION_DIM), found(config, _MERGED)
        if dim is not None and merged is not None:
            # The patches of a square are merged into one before they are projected.
            sides = merged[1] if isinstance(merged[1], (list, tuple)) else [merged[1]] * 2
            patches = math.prod(_rows(side, f"{where}{merged[0]}") for side in sides[:2])
            size = _rows(dim[1], f"{where}{dim[0]}") * patches
            self._rows_of("TP008", size, f"{where}{dim[0]} of {patches} merged patches")

    def _has_dense_layers(self) -> bool:
        """Whether a model with experts has feed-forward layers too."""
        config = self._config
        first, step = config.get("first_k_dense_replace"), config.get("decoder_sparse_step")
        return (
            bool(config.get("mlp_only_layers"))
            or (isinstance(first, int) and first > 0)
            or (isinstance(step, int) and step > 1)
        )

    def _note(self, code: str, name: str) -> tuple[str, str] | None:
        value = self._config.get(name)
        if value is None:
            return code, name
        self._rows_of(code, _rows(value, f"{self._where}{name}"), name)
        return None

    def _note_experts(self, name: str, value: Any) -> None:
        hidden = _rows(value, f"{self._where}{name}")
        if self._degrees.ep > 1:  # whole experts are split, not their rows
            return
        is_doubled = self._config.get("model_type") == "gpt_oss"
        self._rows_of("TP011", hidden, name, has_double=is_doubled)
        rows = (("expert_hidden_dim", hidden, True),)
        experts = Experts(hidden, rows, grouped=True)
        # How many ranks shard the data is the run's, not the config's: FSDP is not judged.
        degrees = self._degrees
        note_experts(
            self._findings, experts, degrees, (), tp=degrees.tp, row_shards=None, place=_place(self._where)
        )

    def _note_shared_experts(self, hidden: Any) -> tuple[str, str] | None:
        if self._config.get("shared_expert_intermediate_size"):
            return self._note("TP010", "shared_expert_intermediate_size")
        shared = self._config.get("n_shared_experts")
        if shared:
            count = _rows(shared, f"{self._where}n_shared_experts")
            self._rows_of("TP010", count * hidden, "n_shared_experts * moe_intermediate_size")
        return None

    def _rows_of(self, code: str, size: int, label: str, *, has_double: bool = False) -> None:
        note_rows(
            self._findings,
            self._degrees,
            code,
            size,
            place=_place(self._where),
            label=label,
            has_double=has_double,
        )


def _place(where: str) -> str:
    return where.rstrip(".") or "the config"


def _rows(value: Any, name: str) -> int:
    return whole_number(value, name, at_most=_MOST_ROWS)
