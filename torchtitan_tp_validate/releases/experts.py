"""What FSDP and the grouped product ask of routed experts, in every line of torchtitan.

A layer's experts share weights of shape (num_experts, rows, columns). Tensor parallelism cuts the hidden
dimension, be it rows or columns; expert parallelism cuts the experts. What they leave on a rank must
suit the kernel that multiplies, and FSDP, which cuts it once more: experts as long as there are enough of
them, rows otherwise, and those only evenly.

Source: ``distributed/fsdp.py`` and ``models/common/moe.py`` of torchtitan 0.3.0,
``models/llama4/infra/parallelize.py`` and ``models/moe/moe.py`` of 0.2.x.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from torchtitan_tp_validate.degrees import SHARDS_ARE_UNKNOWN, Degrees
from torchtitan_tp_validate.plan import PlanBuilder, Split


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer.

    Attributes:
        hidden_dim: their hidden size.
        rows: name and size of each weight's second dimension, and whether tensor parallelism cuts it.
        grouped: whether ``torch._grouped_mm`` multiplies by them.
    """

    hidden_dim: int
    rows: tuple[tuple[str, int, bool], ...]
    grouped: bool


def note_experts(
    findings: PlanBuilder,
    experts: Experts,
    degrees: Degrees,
    layers: Iterable[int],
    *,
    tp: int,
    row_shards: Fraction | None,
    place: str = "",
) -> None:
    """Note what must divide besides what tensor and expert parallelism want themselves.

    Args:
        tp: how many ranks share the hidden dimension; 1 when the plan does not cut it.
        row_shards: FSDP's shards of the rows, per rank that shards the data; None when it cuts experts.
        place: where the experts are, when it is not known in which layers.
    """
    layers = tuple(layers)
    # Elsewhere another kernel multiplies, or none that torchtitan supports.
    if experts.grouped and degrees.device_type == "cuda" and any(cut for _, _, cut in experts.rows):
        findings.add("TP013", experts.hidden_dim, layers=layers, place=place, split=Split.ALIGNED)
    if degrees.fsdp and not degrees.dp_shard_is_known:
        findings.leave_out(f"FSDP001: {SHARDS_ARE_UNKNOWN}")
    if row_shards is None:
        return
    for name, size, cut in dict.fromkeys(experts.rows):
        label = f"{name} / tp" if cut and tp > 1 else name
        for local in _shard_sizes(size, tp if cut else 1):
            findings.add("FSDP001", local, layers=layers, label=label, multiple=row_shards)


def row_shards(degrees: Degrees, num_experts: int, *, ranks: int) -> Fraction | None:
    """FSDP's shards of the experts' rows, per rank that shards the data.

    Args:
        ranks: those that share all experts, by expert parallelism or FSDP; torchtitan compares this
            number with the number of experts.

    Returns:
        None when there are enough experts to be cut; when torchtitan's own FSDP does not do it; or when
        the degrees make no mesh: torchtitan says so itself, before anything else.
    """
    shards = Fraction(degrees.cp)
    if degrees.ep > 1:
        shards *= Fraction(degrees.tp, degrees.ep * degrees.etp)
    return shards if degrees.fsdp and ranks > num_experts and degrees.makes_a_mesh else None


def _shard_sizes(size: int, degree: int) -> list[int]:
    """Return the different sizes of shards that are not empty; an uneven dimension leaves a smaller last."""
    full = -(-size // degree)
    last = size - full * (degree - 1)
    return [full] if last in (full, 0) or last < 0 else [full, last]
