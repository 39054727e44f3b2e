"""A tree of torchtitan 0.3.x configs: what it holds, what each module is made of, and what of it is split.

Every module is described by a dataclass, which may carry a ``sharding_config``: which dimension of which
parameter is split over which mesh axis.

Source: ``protocols/sharding.py``, ``protocols/module.py``, ``components/quantization`` of torchtitan 0.3.0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchtitan_tp_validate.degrees import Axis
from torchtitan_tp_validate.errors import PlanError

_BLOCK_SIZES = {
    "Float8Linear": 16,
    "Float8GroupedExperts": 16,
    "MXFP8Linear": 32,
    "MXFP8GroupedExperts": 128,
    "NVFP4Linear": 128,
}
"""What each class of torchtitan's ``components/quantization`` takes at a time."""


@dataclass(frozen=True)
class _Kind:
    """What a class of configs is made of.

    Attributes:
        children: the fields that can hold other configs.
        plain: the fields that hold numbers and words.
    """

    children: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()


def _kind(config: Any) -> _Kind:
    return _kind_of(type(config))  # type: ignore[arg-type]  # a class is hashable


@functools.cache
def _kind_of(cls: Hashable) -> _Kind:
    if not dataclasses.is_dataclass(cls):
        return _Kind()
    fields = dataclasses.fields(cls)
    plain = tuple(field.name for field in fields if _is_plain(field.type))
    others = ("param_init", "sharding_config", *plain)
    return _Kind(tuple(field.name for field in fields if field.name not in others), plain)


def _is_plain(annotation: Any) -> bool:
    """Whether a field of this type holds a number or a word."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return all(part.strip() in ("int", "float", "bool", "str", "None") for part in text.split("|"))


def parts(config: Any) -> Iterator[tuple[str, Any]]:
    """Return ``(name, value)`` of every field of a config that can hold other configs."""
    return ((name, getattr(config, name, None)) for name in _kind(config).children)


def children(config: Any) -> Iterator[tuple[str, Any]]:
    """Return ``(name, config)`` of what a config holds, list items with their position."""
    for name, child in parts(config):
        if isinstance(child, (list, tuple)):
            yield from ((f"{name}[{position}]", item) for position, item in enumerate(child))
        elif child is not None:
            yield name, child


def nodes(config: Any) -> Iterator[Any]:
    """Return a config and all below it."""
    yield config
    for _, child in children(config):
        yield from nodes(child)


def declares_shardings(config: Any) -> bool:
    """Return whether a config, or one below it, says what is split."""
    return any(getattr(node, "sharding_config", None) is not None for node in nodes(config))


def alike(layers: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """Return one layer of each kind, and the indices of all layers of that kind.

    Layers are alike when they are made of the same classes with the same numbers: torchtitan declares its
    shardings by class, so that one of them speaks for all. Reading a hundred equal layers would cost a
    hundred times as much.
    """
    groups: dict[Any, tuple[Any, list[int]]] = {}
    for index, layer in enumerate(layers):
        key = _made_of(layer) if dataclasses.is_dataclass(layer) else id(layer)
        groups.setdefault(key, (layer, []))[1].append(index)
    return list(groups.values())


def _made_of(node: Any) -> Any:
    """Return the classes and numbers of a config and of all below it."""
    if isinstance(node, (list, tuple)):
        return tuple(map(_made_of, node))
    kind = _kind(node)
    return (
        type(node),
        # A field may have no value before the config is built.
        *(getattr(node, name, None) for name in kind.plain),
        *(_made_of(value) for _, value in parts(node)),
    )


def cuts(config: Any) -> Iterator[tuple[Axis, str, int]]:
    """Return ``(axis, parameter, dimension)`` of all that a module's own sharding config splits.

    It may name parameters that the module does not have.

    Raises:
        PlanError: it says so in a way that is not known.
    """
    for name, layout in config.sharding_config.state_shardings.items():
        types = _types_of(layout)
        for axis in (Axis.TP, Axis.EP):
            dim = getattr(types.get(axis.value), "dim", None)
            if dim is not None:
                yield axis, name, dim


def _types_of(layout: Any) -> Mapping[str, Any]:
    """Return what a layout does to a parameter, by axis."""
    if isinstance(layout, Mapping):  # main until June 2026
        return layout
    if hasattr(layout, "per_axis_spmd_types"):
        types: Mapping[str, Any] = layout.per_axis_spmd_types()
        return types
    raise PlanError(f"a {type(layout).__qualname__} does not say what it splits.")


def block_size(config: Any) -> int:
    """Return how many rows or columns a low-precision product takes at a time; 0 for any other module."""
    for kind in type(config).__mro__:  # LoRA and KV-head replication make classes of their own of it
        if kind.__module__.startswith("torchtitan.components.quantization."):
            # Experts' classes are made in a function, of whatever class they replace.
            owner = kind.__qualname__.rpartition(".")[0].rpartition(".")[2]
            return _BLOCK_SIZES.get(owner, 0)
    return 0


@dataclass(frozen=True)
class Built:
    """What a config's own module is made of.

    Attributes:
        weights: name -> shape of its parameters.
        buffers: name -> shape of its buffers.
        grouped: whether it multiplies by way of torchtitan's ``_grouped_mm``.
    """

    weights: dict[str, tuple[int, ...]]
    buffers: dict[str, tuple[int, ...]]
    grouped: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of either."""
        return self.weights | self.buffers


def built(config: Any) -> Built:
    """Return what the module that a config describes is made of, without what is below it.

    Raises:
        PlanError: the module cannot be built on meta.
    """
    key = (type(config), *(getattr(config, name, None) for name in _kind(config).plain))
    if key not in _known:
        import torch

        try:
            with torch.device("meta"):
                module = config.build()
        except Exception as error:
            raise PlanError(f"{type(config).__qualname__} cannot be built: {error}") from error
        _known[key] = Built(
            weights={name: tuple(state.shape) for name, state in module.named_parameters(recurse=False)},
            buffers={name: tuple(state.shape) for name, state in module.named_buffers(recurse=False)},
            grouped=hasattr(module, "_grouped_mm"),
        )
    return _known[key]


_known: dict[tuple[Any, ...], Built] = {}
"""The layers of a model are alike: each distinct module is built once, on meta."""
