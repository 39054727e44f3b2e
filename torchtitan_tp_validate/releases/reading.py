"""What the readers share: sizes taken only when they are sizes, and names for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.models import FAMILY_OF
from torchtitan_tp_validate.plan import PlanBuilder, Split
from torchtitan_tp_validate.rules import Line

Heads = dict[str, int]
"""Rule code -> number of heads, of one layer."""

# No model has more; a damaged file may say anything.
_MOST_HEADS = 1_000_000


def positive_int(holder: Any, field: str, where: str) -> int:
    """``holder.field`` as an int of at least 1.

    Args:
        where: how to name the holder in the error.

    Raises:
        PlanError: it is missing or something else: named with its value, never guessed.
    """
    return whole_number(getattr(holder, field, None), f"{where}.{field}")


def whole_number(value: Any, name: str, *, at_most: int | None = None) -> int:
    """``value`` as an int of at least 1.

    Args:
        name: how to name it in the error.
        at_most: the largest that can be meant.

    Raises:
        PlanError: it is something else: named with its value, never guessed.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(f"{name} must be a positive whole number, got {shortened(value)}.")
    if at_most is not None and value > at_most:
        raise PlanError(f"{name} must be at most {at_most}, got {shortened(value)}.")
    return value


def shortened(value: Any) -> str:
    """Return a value for people, in one line of at most 80 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception as error:  # an int of too many digits, a list in itself, an object of the user's own
        text = f"a value that cannot be shown ({type(error).__name__})"
    return text if len(text) <= 80 else f"{text[:77]}..."


def head_count(value: Any, name: str) -> int:
    """Return ``value`` as a number of heads.

    Raises:
        PlanError: it is none, or more than any model has.
    """
    return whole_number(value, name, at_most=_MOST_HEADS)


def attention_heads(holder: Any, where: str) -> Heads:
    """Return the heads that a column-wise split of wq, wk and wv must keep whole.

    Args:
        holder: whatever carries ``n_heads`` and perhaps ``n_kv_heads``. None for the latter means
            multi-head attention, and no such field means MLA: both are split by ``n_heads`` alone.
        where: how to name the holder in an error.
    """
    heads = {"TP001": positive_int(holder, "n_heads", where)}
    if getattr(holder, "n_kv_heads", None) is not None:
        heads["TP002"] = positive_int(holder, "n_kv_heads", where)
    return heads


def share_kv_heads(shared: PlanBuilder, n_kv_heads: int, head_dim: int, layers: Iterable[int]) -> None:
    """Note what KV-head replication asks for in the place of a divisible ``n_kv_heads``.

    Args:
        shared: where to note it.
        n_kv_heads: key-value heads of these layers; several ranks may share one.
        head_dim: rows of wk, and of wv, per head. The rows stay split evenly, through a head if need be.
        layers: their indices.
    """
    layers = tuple(layers)
    shared.add("TP002", n_kv_heads, layers=layers, split=Split.SHARED, line=Line.KV_REPLICATION)
    shared.add("TP014", n_kv_heads * head_dim, layers=layers)


def family_name(config: Any, *, has_experts: bool) -> str:
    """Return the model's name for people: of the family that its module belongs to, else of its class."""
    family = next(
        (FAMILY_OF[p] for p in reversed(type(config).__module__.split(".")) if p in FAMILY_OF), None
    )
    if family is None:
        # A 0.3.x config is a nested class: MyModel.Config describes MyModel.
        return type(config).__qualname__.removesuffix(".Config")
    return f"{family.title}-MoE" if has_experts and family.has_moe_title else family.title
