"""Make a model small without changing what its parallelization can and cannot split.

What a rule asks of a size is what is left of it modulo a degree. So the counts stay (heads, experts), one
layer of each kind stays, and the widths become the smallest that leave the same remainders: what divides
still divides, and what does not still does not.

A config tree of torchtitan 0.3.x is shrunk by the names that its models share. In a model of somebody's own,
a linear or norm of another name is on the residual stream where it is as wide; a linear that may read it as
well as write it is named, and nothing is guessed.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.errors import ShrinkError

_READS_STREAM = frozenset(
    {"wq", "wk", "wv", "wkv", "wqkv", "wq_a", "wkv_a", "o_gate", "w1", "w3", "gate", "lm_head"}
    | {f"in_proj_{name}" for name in "qkvzab"}
)
"""Linears whose input is the residual stream."""

_WRITES_STREAM = frozenset({"w2", "wo", "out_proj"})
"""Linears whose output is."""

_NORMALIZES_HEADS = frozenset(
    {"qk_norm", "q_norm", "k_norm", "q_a_norm", "kv_norm", "query_norm", "key_norm"}
)
"""Norms of something else, which may be as wide by chance."""

_WHOLE_BYTES = 8
"""The grouped product takes rows of whole 16 bytes, of 2 bytes a value (TP013)."""

_LEAST = 64
"""Widths that are no larger stay as they are: below it nothing gets faster."""

_LEAST_HEAD_DIM = 8


def same_remainders(size: int, degrees: Degrees, *, block: int = _WHOLE_BYTES) -> int:
    """Return the smallest size that every rule judges like this one.

    Args:
        size: of a dimension, in units.
        degrees: of the run.
        block: how many units a kernel takes at a time.
    """
    # From the square of a degree on, rounding up leaves no rank of it without a shard.
    least = max(_LEAST, max(degrees.tp, degrees.dp_shard) ** 2)
    return _smallest(size, _modulus(degrees) * block, least)


def shrink(config: Any, degrees: Degrees, *, block: int = _WHOLE_BYTES, least_layers: int = 1) -> Any:
    """Return a small copy of a model's config, which gets the same verdicts at these degrees.

    Args:
        config: the config tree of a torchtitan 0.3.x model, or the model args of a 0.2.x one.
        degrees: of the run.
        block: how many units the narrowest kernel of the model takes at a time, see `same_remainders`.
        least_layers: how many layers there must be, where the model has so many.

    Raises:
        ShrinkError: something carries the residual stream under a name that is not known.
    """
    is_tree = isinstance(getattr(config, "layers", None), (list, tuple))
    return (_shrink_tree if is_tree else _shrink_args)(config, degrees, block, least_layers)


def _modulus(degrees: Degrees) -> int:
    """Return what every remainder that a rule looks at is a remainder of."""
    return math.lcm(degrees.tp, degrees.ep, degrees.dp_shard, degrees.cp)


def _smallest(size: int, modulus: int, least: int) -> int:
    """Return the smallest number from ``least`` on with the remainder of ``size``, which is the largest."""
    return min(size, least + (size - least) % modulus)


def _shrink_args(args: Any, degrees: Degrees, block: int, least_layers: int) -> Any:
    """Shrink the model args of torchtitan 0.2.x, where formulas give what is not among them.

    Source: ``models/*/model/args.py`` and ``model.py`` of torchtitan 0.2.2.
    """
    small = copy.deepcopy(args)
    for name in ("vocab_size", "hidden_dim", "inter_dim", "moe_inter_dim", "dim"):
        if hasattr(args, name):
            setattr(small, name, same_remainders(getattr(args, name), degrees, block=block))
    if not hasattr(args, "head_dim") and not hasattr(args, "qk_nope_head_dim"):
        small.dim = args.n_heads * _head_dim(args, degrees, block)
    if hasattr(args, "multiple_of"):
        _scale_feed_forward(args, small, degrees, block)
    small.n_layers = min(args.n_layers, max(least_layers, _layers_of_all_kinds(args)))
    if hasattr(args, "n_dense_layers"):
        small.n_dense_layers = min(args.n_dense_layers, 1)
    return small


def _head_dim(args: Any, degrees: Degrees, block: int) -> int:
    """Return a small head_dim where the model is as wide as its heads: both leave the same remainders."""
    modulus = _modulus(degrees)
    of_dim = modulus * block // math.gcd(modulus * block, args.n_heads)
    # RoPE turns pairs.
    return _smallest(args.dim // args.n_heads, math.lcm(2, modulus, of_dim), _LEAST_HEAD_DIM)


def _scale_feed_forward(args: Any, small: Any, degrees: Degrees, block: int) -> None:
    """Scale what the hidden sizes of llama3 and llama4 are rounded up to, and what is rounded, alike.

    So each stays the same multiple of it.
    """
    small.multiple_of = _smallest(args.multiple_of, _modulus(degrees) * block, block)
    multiplier = 1.0 if args.ffn_dim_multiplier is None else args.ffn_dim_multiplier
    hidden = int(multiplier * int(8 * args.dim / 3))
    scaled = math.ceil(hidden * small.multiple_of / args.multiple_of)
    # The half keeps the product of two floats on its side of the whole number that it is cut to.
    small.ffn_dim_multiplier = (scaled + 0.5) / int(8 * small.dim / 3)


def _layers_of_all_kinds(args: Any) -> int:
    """How many of the first layers have one of each kind; which kind one is follows from its index."""
    periods = [
        getattr(args, name, None) or 1 for name in ("interleave_moe_layer_step", "every_n_layers_nope")
    ]
    if hasattr(args, "sliding_window_size"):
        periods.append(2)
    return min(getattr(args, "n_dense_layers", 0), 1) + math.lcm(*periods)


def _shrink_tree(config: Any, degrees: Degrees, block: int, least_layers: int) -> Any:
    """Shrink a config tree of torchtitan 0.3.x."""
    small = copy.copy(config)
    small.layers = _one_of_each_kind(config.layers, least_layers)
    small = copy.deepcopy(small)
    widths = _Widths(lambda size: same_remainders(size, degrees, block=block), small.dim, small.vocab_size)
    for path, name, node in configs_below(small):
        widths.set(path, name, node)
    small.dim, small.vocab_size = widths.dim, widths.vocab_size
    return small


def _one_of_each_kind(layers: list[Any], least: int) -> list[Any]:
    """Return the first layer of each kind, and more where there must be more, in the order of the model."""
    first: dict[Hashable, int] = {}
    for index, layer in enumerate(layers):
        first.setdefault(_kind(layer), index)
    kept = set(first.values())
    others = (index for index in range(len(layers)) if index not in kept)
    kept |= set(itertools.islice(others, max(0, least - len(kept))))
    return [layers[index] for index in sorted(kept)]


def _kind(value: Any) -> Hashable:
    """Return what two layers have in common that differ only in how they are initialized."""
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        # Initial values are scaled by the layer's index.
        return type(value), tuple((n, _kind(getattr(value, n, None))) for n in names if n != "param_init")
    return value if isinstance(value, (int, float, str, type(None))) else type(value).__qualname__


class _Widths:
    """The new widths of a model, set wherever an old one stands."""

    def __init__(self, smaller: Callable[[int], int], dim: int, vocab_size: int) -> None:
        self._smaller = smaller
        self._dim, self.dim = dim, smaller(dim)
        self.vocab_size = smaller(vocab_size)

    def set(self, path: str, name: str, node: Any) -> None:
        """Set those of one config of the tree."""
        if path.startswith("vision"):
            self._set_vision(name, node, path)
        elif hasattr(node, "num_embeddings"):
            node.num_embeddings, node.embedding_dim = self.vocab_size, self.dim
        elif hasattr(node, "in_features"):
            self._set_linear(path, name, node)
        elif name not in _NORMALIZES_HEADS and name.endswith("norm"):
            self._set_norm(node)
        elif hasattr(node, "hidden_dim"):
            node.hidden_dim = self._smaller(node.hidden_dim)
            node.dim = self.dim
        elif name == "attention" and hasattr(node, "dim"):
            node.dim = self.dim

    def _set_linear(self, path: str, name: str, node: Any) -> None:
        is_known = name in _READS_STREAM | _WRITES_STREAM
        reads, writes = node.in_features == self._dim, node.out_features == self._dim
        if not is_known and reads and writes:
            raise ShrinkError(
                f"{path} is {node.in_features} by {node.out_features}, and the model's dim is {self._dim}: "
                "it is not known whether it reads or writes the residual stream"
            )
        if reads and name not in _WRITES_STREAM:
            node.in_features = self.dim
        if writes and name not in _READS_STREAM:
            node.out_features = self.dim
        if name in ("w1", "w3"):
            node.out_features = self._smaller(node.out_features)
        elif name == "w2":
            node.in_features = self._smaller(node.in_features)
        elif name == "lm_head":
            node.out_features = self.vocab_size

    def _set_vision(self, name: str, node: Any, path: str) -> None:
        """Images are small as they are: only what they hand to the text model follows it."""
        if name == "vision_encoder":
            node.num_layers = min(node.num_layers, 1)
        elif getattr(node, "out_features", None) == self._dim and "block" not in path:
            node.out_features = self.dim

    def _set_norm(self, node: Any) -> None:
        for field in ("normalized_shape", "dim"):
            if getattr(node, field, None) == self._dim:
                setattr(node, field, self.dim)


def configs_below(config: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield ``(path, field name, config)`` of every config below this one."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        at = f"{path}.{field.name}".removeprefix(".")
        children = enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
        for index, child in children:
            if dataclasses.is_dataclass(child):
                child_path = at if index is None else f"{at}[{index}]"
                yield child_path, field.name, child
                yield from configs_below(child, child_path)
