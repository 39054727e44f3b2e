"""torchtitan 0.3.x: a config tree describes the model.

In 0.3.x every module's config may carry a ``sharding_config`` that says which dimension of which
parameter is split over which mesh axis. That is what is read: a model that nobody told us about is
judged by the same rule. Head counts are declared beside it (``layers[i].attention.n_kv_heads``); a
gated-delta layer has no attention but a ``delta_net``.

Source: ``protocols/sharding.py``, ``models/common/decoder.py`` and ``models/qwen3_5/model.py`` of
torchtitan 0.3.0.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG, TOKEN_FIELDS, Axis, Degrees, token_field
from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.plan import Plan, PlanBuilder, ShardedDim
from torchtitan_tp_validate.releases.experts import Experts, note_experts, row_shards
from torchtitan_tp_validate.releases.kv_replication import problem_with_attention
from torchtitan_tp_validate.releases.reading import (
    Heads,
    attention_heads,
    family_name,
    positive_int,
    share_kv_heads,
)
from torchtitan_tp_validate.releases.rows import (
    line_of,
    note_rows,
    note_sequence,
    splits_sequence,
)

HOW_TO_CHANGE = (
    "--parallelism.{flag} {degree}, or in the config registry:\n"
    "  parallelism=ParallelismConfig({flag}={degree})"
)
_HOW_TO_REPLICATE = "--replicate-kv-heads, or converters=[ReplicateKVHeads.Config()]"
_REFUSED = "torchtitan itself refuses this run when it builds the model: {}"

_BLOCK_SIZES = {
    "Float8Linear": 16,
    "Float8GroupedExperts": 16,
    "MXFP8Linear": 32,
    "MXFP8GroupedExperts": 128,
    "NVFP4Linear": 128,
}
"""What each class of torchtitan's ``components/quantization`` takes at a time."""

_EXPERTS = "routed_experts.inner_experts"
"""Where torchtitan's FSDP looks for the weights of a layer's experts."""

_HAS_ONE_FSDP_AXIS = "partial_dtensor"
"""The backend whose FSDP mesh is that of the data alone; the others hand FSDP the TP axis too."""


@dataclass(frozen=True)
class InRun:
    """A model's config together with the run that it is for, to be judged in the place of a model.

    Attributes:
        config: the config tree, as a model has one.
        run: ``Trainer.Config``, whose sections decide which shardings the tree declares. Never changed.
    """

    config: Any
    run: Any


def in_run(config: Any, run: Any) -> Any:
    """Return what to judge of a job: its model's config, with its run where that makes a difference."""
    return InRun(config, run) if run is not None and _declares_later(config) else config


def find_config(model_or_config: Any) -> Any | None:
    """The config tree of a model, or the tree itself, or None when this is neither."""
    config = getattr(model_or_config, "config", model_or_config)
    return config if _has_layer_list(config) else None


def read(config: Any, model: Any, degrees: Degrees) -> Plan:
    """Return the plan that the model's parallelization applies to a model with this config tree.

    Modules are built from the tree, so the tree is the truth: of ``model`` the run alone is looked at, where
    it is an `InRun`.
    """
    return bind(config, model)(degrees)


def bind(config: Any, model: Any) -> Callable[[Degrees], Plan]:
    """Return what reads that plan at any degrees.

    A tree is walked once for all degrees at which the same shardings are declared: what else depends on the
    degrees is added to what was found there.
    """
    run = model.run if isinstance(model, InRun) else None
    walks: dict[tuple[bool, str], _Reading] = {}

    def read_at(degrees: Degrees) -> Plan:
        # torchtitan's sharding configs know of a backend, and whether experts are spread over ranks.
        declares = degrees.ep > 1, degrees.spmd_backend
        if declares not in walks:
            walks[declares] = _walk(config, degrees, run)
        plan = walks[declares].plan(config, degrees)
        # A converted config says so itself, whatever was asked for.
        return plan.with_kv_replication() if hasattr(config, "replicates_kv_heads") else plan

    return read_at


def _walk(config: Any, degrees: Degrees, run: Any) -> _Reading:
    reading = _Reading(degrees)
    reading.tree(_with_shardings(config, degrees, run))
    return reading


class _Reading:
    """One walk through a config tree."""

    def __init__(self, degrees: Degrees) -> None:
        self.findings = PlanBuilder(line_of(degrees))
        self.shared_kv = PlanBuilder(line_of(degrees))
        self.all_share = True
        self.unread: list[str] = []
        self._n_layers = 0
        self._experts: list[_LayerExperts] = []
        self._degrees = degrees

    def plan(self, config: Any, degrees: Degrees) -> Plan:
        """Return what was found, and what it means for these degrees."""
        more = PlanBuilder(line_of(degrees))
        note_sequence(more, degrees)
        if degrees.seq_len is None and splits_sequence(degrees):
            more.leave_out(f"TP009: no {token_field()} is given")
        for experts in self._experts:
            experts.note(more, degrees)
        return Plan(
            model=family_name(config, has_experts=_has_experts(config)),
            dims=(*self._dims, *more.dims()),
            n_layers=self._n_layers,
            how_to_change=HOW_TO_CHANGE,
            unread=tuple(self.unread),
            not_judged=(*self.findings.not_judged, *more.not_judged),
            how_to_replicate=_HOW_TO_REPLICATE,
            shared_kv=self._shared_dims,
        )

    @functools.cached_property
    def _dims(self) -> tuple[ShardedDim, ...]:
        return self.findings.dims()

    @functools.cached_property
    def _shared_dims(self) -> tuple[ShardedDim, ...]:
        return self.shared_kv.dims() if self.all_share else ()

    def tree(self, config: Any) -> None:
        """Read a 0.3.x tree: its layers by index, multi-token-prediction layers at the end."""
        self._n_layers = len(config.layers) + len(getattr(config, "mtp_layers", ()))
        for name in _kind(config).children:
            if name not in ("layers", "mtp_layers"):
                self._node(getattr(config, name), name, ())
                self._vision_heads(getattr(config, name), name)
        for layer, indices in _alike((*config.layers, *getattr(config, "mtp_layers", ()))):
            self._layer(layer, f"layers[{indices[0]}]", tuple(indices))

    def _vision_heads(self, encoder: Any, name: str) -> None:
        """Notice when a vision encoder is split, and nothing in it told how many heads it has."""
        found = any(dim.code == "TP007" for dim in self.findings.dims())
        if "vision" in name and not found and any(True for _ in _shardings_below(encoder)):
            self.findings.leave_out(f"TP007: nothing in {name} has num_heads beside wq")

    def _layer(self, layer: Any, path: str, layers: tuple[int, ...]) -> None:
        attention, delta_net = getattr(layer, "attention", None), getattr(layer, "delta_net", None)
        if hasattr(attention, "n_heads"):
            heads = attention_heads(attention, f"{path}.attention")
        elif delta_net is not None:
            heads = _gated_delta_heads(delta_net, f"{path}.delta_net")
        else:
            heads = {}
            if next(_shardings_below(layer), None) is None:
                self.unread += (f"layers[{index}]" for index in layers)
            elif attention is not None and next(_shardings_below(attention), None) is not None:
                self.findings.leave_out(f"TP001, TP002: {path}.attention has no n_heads")
        self._heads(heads, layers)
        if attention is not None and "TP002" in heads:
            self._share(attention, heads["TP002"], layers)
        for name in _kind(layer).children:
            mixer = name in ("attention", "delta_net")
            self._node(getattr(layer, name), f"{path}.{name}", layers, tuple(heads.values()) if mixer else ())

    def _share(self, attention: Any, n_kv_heads: int, layers: tuple[int, ...]) -> None:
        """Note what KV-head replication asks for in these layers, if all layers can have it."""
        self.all_share &= problem_with_attention(attention) is None
        if self.all_share:
            head_dim = attention.head_dim or attention.dim // attention.n_heads
            share_kv_heads(self.shared_kv, n_kv_heads, head_dim, layers)

    def _heads(self, heads: Heads, layers: tuple[int, ...]) -> None:
        for code, size in heads.items():
            self.findings.add(code, size, layers=layers)

    def _node(self, node: Any, path: str, layers: tuple[int, ...], heads: tuple[int, ...] = ()) -> None:
        """Read a config and all below it; ``heads`` are the head counts that its parameters are made of."""
        kind = _kind(node)
        if kind.is_config and node.sharding_config is not None:
            splits = list(_splits(node, kind))
            sizes = {size for axis, _, size in splits if axis is Axis.TP}
            for what, missing in _missing(node, kind):
                self.findings.leave_out(f"{what}: {path}.{missing} is not there")
            if path.endswith(_EXPERTS):
                self._note_experts(node, kind, layers, path)
            block = _block(node)
            for axis, name, size in splits:
                if axis is Axis.TP and block:
                    label = f"{_in_layer(path, bool(layers))}.{name}"
                    self.findings.add("TP015", size, layers=layers, place=path, label=label, multiple=block)
                # What is made of whole heads is split like them, and the double like its half.
                implied = any(size % count == 0 for count in heads) or size / 2 in sizes
                if axis is Axis.EP:
                    self.findings.add("EP001", size, layers=layers)
                elif not implied:
                    self._split(node, size, f"{path}.{name}", layers, has_double=2 * size in sizes)
        if hasattr(node, "num_heads") and hasattr(node, "wq"):
            heads = (positive_int(node, "num_heads", path),)
            self.findings.add("TP007", heads[0], layers=layers, place=path)
        for name, child in _children(node, kind):
            self._node(child, f"{path}.{name}", layers, heads)

    def _split(self, node: Any, size: int, path: str, layers: tuple[int, ...], *, has_double: bool) -> None:
        """Note a dimension that is split over TP and does not consist of heads."""
        code, label = _what_is_split(node, path, in_layer=bool(layers))
        place = path.rpartition(".")[0]
        note_rows(
            self.findings,
            self._degrees,
            code,
            size,
            layers=layers,
            place=place,
            label=label,
            has_double=has_double,
        )

    def _note_experts(self, node: Any, kind: _Kind, layers: tuple[int, ...], path: str) -> None:
        """Keep what FSDP and the grouped product ask about."""
        if not hasattr(node, "hidden_dim"):
            self.findings.leave_out(f"TP013, FSDP001: {path} has no hidden_dim")
            return
        cut = {name for axis, name, dim in _cuts(node, kind) if axis is Axis.TP and dim == 1}
        built = _built(node, kind)
        rows = ((name, shape[1]) for name, shape in built.weights.items() if len(shape) > 1)
        experts = Experts(
            positive_int(node, "hidden_dim", _EXPERTS),
            tuple((_row_name(node, size), size, name in cut) for name, size in rows),
            grouped=built.grouped,
        )
        self._experts.append(_LayerExperts(experts, positive_int(node, "num_experts", _EXPERTS), layers))


@dataclass(frozen=True)
class _LayerExperts:
    """The experts of layers that are alike."""

    experts: Experts
    num_experts: int
    layers: tuple[int, ...]

    def note(self, findings: PlanBuilder, degrees: Degrees) -> None:
        """Note what FSDP and the grouped product ask of them at these degrees."""
        ranks = degrees.dp_shard * degrees.cp
        if degrees.ep > 1 or degrees.spmd_backend != _HAS_ONE_FSDP_AXIS:
            ranks *= degrees.tp
        if degrees.ep == 1:
            ranks *= degrees.dp_replicate
        shards = row_shards(degrees, self.num_experts, ranks=ranks)
        note_experts(findings, self.experts, degrees, self.layers, tp=degrees.tp, row_shards=shards)


def _row_name(node: Any, size: int) -> str:
    """What an expert weight's second dimension of this size is called; gpt_oss has a double one."""
    known = {2 * node.hidden_dim: "2 * expert_hidden_dim", node.hidden_dim: "expert_hidden_dim"}
    return known.get(size, "dim")


def _what_is_split(node: Any, path: str, *, in_layer: bool) -> tuple[str, str]:
    """``(rule code, label)`` of a parameter's dimension."""
    if "tok_embeddings" in path or "lm_head" in path:
        return "TP006", ""
    if hasattr(node, "num_experts"):
        return "TP011", ""
    if "shared_experts" in path:
        return "TP010", ""
    if "vision" in path:
        return "TP008", ""
    if "feed_forward" in path:
        return "TP005", ""
    return "TP012", _in_layer(path, in_layer)


def _in_layer(path: str, in_layer: bool) -> str:
    """A path from the layer on, for those that are in one."""
    return path.partition("].")[2] if in_layer else path


def _block(node: Any) -> int:
    """How many rows or columns a low-precision product takes at a time; 0 for any other module."""
    kind = type(node)
    if not kind.__module__.startswith("torchtitan.components.quantization."):
        return 0
    # Experts' classes are made in a function, of whatever class they replace.
    owner = kind.__qualname__.rpartition(".")[0].rpartition(".")[2]
    return _BLOCK_SIZES.get(owner, 0)


def _alike(layers: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """One layer of each kind, and the indices of all layers of that kind.

    Layers are alike when they are made of the same classes with the same numbers: torchtitan declares its
    shardings by class, so that one of them speaks for all. Reading a hundred equal layers would cost a
    hundred times as much.
    """
    groups: dict[Any, tuple[Any, list[int]]] = {}
    structures: dict[type, list[_Structure]] = {}
    for index, layer in enumerate(layers):
        known = structures.setdefault(type(layer), [])
        key = next((key for key in (structure.key(layer) for structure in known) if key is not None), None)
        if key is None:
            known.append(_Structure(layer))
            key = known[-1].key(layer)
        groups.setdefault(key, (layer, []))[1].append(index)
    return list(groups.values())


class _Structure:
    """The classes that a layer config is made of, and how to read all its numbers in one go."""

    def __init__(self, layer: Any) -> None:
        classes: list[str] = []
        numbers: list[str] = []
        self._is_read = self._collect(layer, "", classes, numbers) and bool(classes)
        if self._is_read:
            self._read = operator.attrgetter("__class__", *classes, *numbers)
            self._classes = self._read(layer)[: len(classes) + 1]

    def key(self, layer: Any) -> Any:
        """What is equal for equal layers, or None for a layer of another structure."""
        if not self._is_read:
            return id(layer)
        try:
            values = self._read(layer)
        except AttributeError:
            return None
        return values if values[: len(self._classes)] == self._classes else None

    def _collect(self, node: Any, prefix: str, classes: list[str], numbers: list[str]) -> bool:
        kind = _kind(node)
        numbers += (prefix + name for name in kind.plain)
        complete = dataclasses.is_dataclass(node)
        for name in kind.children:
            child = getattr(node, name)
            classes.append(f"{prefix}{name}.__class__")
            if isinstance(child, (list, tuple)):
                return False
            if dataclasses.is_dataclass(child):
                complete &= self._collect(child, f"{prefix}{name}.", classes, numbers)
        return complete


@dataclass(frozen=True)
class _Kind:
    """What a class of configs is made of.

    Attributes:
        children: the fields that can hold other configs.
        plain: the fields that hold numbers and words.
        is_config: whether it can declare shardings.
    """

    children: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    is_config: bool = False


def _kind(node: Any) -> _Kind:
    return _kind_of(type(node))  # type: ignore[arg-type]  # a class is hashable


@functools.cache
def _kind_of(cls: Hashable) -> _Kind:
    if not dataclasses.is_dataclass(cls):
        return _Kind()
    names = [f.name for f in dataclasses.fields(cls)]
    plain = tuple(f.name for f in dataclasses.fields(cls) if _is_plain(f.type))
    others = ("param_init", "sharding_config", *plain)
    return _Kind(
        children=tuple(name for name in names if name not in others),
        plain=plain,
        is_config="sharding_config" in names,
    )


def _children(node: Any, kind: _Kind) -> Iterator[tuple[str, Any]]:
    """``(name, config)`` of what a config holds, list items with their position."""
    for name in kind.children:
        child = getattr(node, name)
        if isinstance(child, (list, tuple)):
            yield from ((f"{name}[{position}]", item) for position, item in enumerate(child))
        elif child is not None:
            yield name, child


def _is_plain(annotation: Any) -> bool:
    """Whether a field of this type holds a number or a word."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return all(part.strip() in ("int", "float", "bool", "str", "None") for part in text.split("|"))


def _splits(node: Any, kind: _Kind) -> Iterator[tuple[Axis, str, int]]:
    """``(axis, parameter, size)`` of every dimension of a module's own parameters that is split."""
    shapes = _built(node, kind).shapes
    yield from ((axis, name, shapes[name][dim]) for axis, name, dim in _cuts(node, kind))


def _cuts(node: Any, kind: _Kind) -> Iterator[tuple[Axis, str, int]]:
    """``(axis, parameter, dimension)`` of the same."""
    return (cut for cut in _declared_cuts(node) if cut[1] in _built(node, kind).shapes)


def _missing(node: Any, kind: _Kind) -> Iterator[tuple[str, str]]:
    """``(rule, parameter)`` of every split parameter that the module does not have.

    A bias is there or not; a sharding for one says nothing about a module without.
    """
    for axis, name, _ in _declared_cuts(node):
        if name not in _built(node, kind).shapes and not name.endswith("bias"):
            yield "EP001" if axis is Axis.EP else "TP012", name


def _declared_cuts(node: Any) -> Iterator[tuple[Axis, str, int]]:
    """``(axis, parameter, dimension)`` of all that a module's sharding config splits."""
    for name, layout in node.sharding_config.state_shardings.items():
        types = layout.per_axis_spmd_types()
        for axis in (Axis.TP, Axis.EP):
            dim = getattr(types.get(axis.value), "dim", None)
            if dim is not None:
                yield axis, name, dim


@dataclass(frozen=True)
class _Built:
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


def _built(node: Any, kind: _Kind) -> _Built:
    """The module that a config describes, without what is below it.

    Raises:
        PlanError: the module cannot be built on meta.
    """
    key = (type(node), *(getattr(node, name) for name in kind.plain))
    built = _known.get(key)
    if built is None:
        import torch

        try:
            with torch.device("meta"):
                module = node.build()
        except Exception as error:
            raise PlanError(f"{type(node).__qualname__} cannot be built: {error}") from error
        built = _known[key] = _Built(
            weights={name: tuple(state.shape) for name, state in module.named_parameters(recurse=False)},
            buffers={name: tuple(state.shape) for name, state in module.named_buffers(recurse=False)},
            grouped=hasattr(module, "_grouped_mm"),
        )
    return built


_known: dict[tuple[Any, ...], _Built] = {}
"""The layers of a model are alike: each distinct module is built once, on meta."""


def find_torchtitan_refusal(model_or_config: Any, degrees: Degrees) -> str | None:
    """Return why torchtitan itself does not take a model with its run, in its own words, or None.

    It says so in ``update_from_config``, when its process groups are up: a sequence longer than RoPE, a
    dispatcher without room for a rank's tokens. Heads that do not divide are among its reasons, so ask
    after the verdict.
    """
    if not isinstance(model_or_config, InRun):
        return None
    try:
        _declared(model_or_config.config, model_or_config.run, degrees)
    except Exception as error:
        return _REFUSED.format(error)
    return None


def _declares_later(config: Any) -> bool:
    """Whether a tree has its shardings still to come, in ``update_from_config``."""
    is_tree = _has_layer_list(config) and hasattr(config, "update_from_config")
    return is_tree and next(_shardings_below(config), None) is None


def _with_shardings(config: Any, degrees: Degrees, run: Any) -> Any:
    """The tree with its shardings declared: as it is, or a copy that went through torchtitan's own hands.

    torchtitan declares them in ``update_from_config``, just before it builds the model, after checks of its
    own. Where one of those stops the job (`find_torchtitan_refusal` says which), or where there is no job, it
    is told of a run that passes them all and declares the same: the verdict is on every layer, and on more
    than they look at.

    Raises:
        PlanError: torchtitan does not get so far.
    """
    if not _declares_later(config):
        return config
    problem = ""
    if run is not None:
        try:
            return _declared(config, run, degrees)
        except Exception as error:
            problem = _REFUSED.format(error)
    try:
        run = _any_run(degrees) if run is None else run
        return _declared(config, run, _Undemanding(config, degrees))
    except Exception as error:
        problem = problem or f"{type(config).__qualname__} does not declare its shardings: {error}"
        raise PlanError(problem) from error


def _declared(config: Any, run: Any, degrees: Degrees | _Undemanding) -> Any:
    """A copy of the tree that a copy of the run, at these degrees, has declared."""
    updated, run = copy.deepcopy((config, run))
    for axis in (Axis.TP, Axis.EP):
        setattr(run.parallelism, axis.flag, degrees.of(axis))
    if isinstance(degrees, _Undemanding):
        degrees.relax(run)
    # A converted config judges the run itself, by way of this function.
    getattr(updated, "update_unjudged", updated.update_from_config)(config=run)
    for node in _nodes(updated):
        # A token dispatcher without a device looks for a GPU as it is built, for buffers that nobody reads.
        if hasattr(node, "num_max_tokens_per_rank") and hasattr(node, "device"):
            node.device = "meta"
    return updated


class _Undemanding:
    """A run that no check of torchtitan's objects to, and that declares what it would at ``degrees``."""

    def __init__(self, config: Any, degrees: Degrees) -> None:
        counts = (getattr(node, "num_experts", 0) for node in _nodes(config))
        experts = math.gcd(*(count for count in counts if isinstance(count, int)))
        self._ep = experts if degrees.ep > 1 and experts > 1 else degrees.ep

    def of(self, axis: Axis) -> int:
        """The degree of one axis; of expert parallelism, whether there is any is what counts."""
        return self._ep if axis is Axis.EP else 1

    def relax(self, run: Any) -> None:
        """Ask for little of everything else: tokens, parallelism, memory."""
        for flag in (FLAGS["cp"], PIPELINE_FLAG):
            setattr(run.parallelism, flag, 1)
        for field in ("local_batch_size", *TOKEN_FIELDS):
            if hasattr(getattr(run, "training", None), field):
                setattr(run.training, field, 1)
        # MinimalAsyncEP wants everything recomputed.
        run.compile = SimpleNamespace(memory_policy="full")


def _any_run(degrees: Degrees) -> Any:
    """A run for a config that has none."""
    from torchtitan.config import ParallelismConfig, TrainingConfig

    parallelism = ParallelismConfig(spmd_backend=degrees.spmd_backend)
    return SimpleNamespace(parallelism=parallelism, training=TrainingConfig(), activation_checkpoint=None)


def _nodes(node: Any) -> Iterator[Any]:
    """A config and all below it."""
    yield node
    for _, child in _children(node, _kind(node)):
        yield from _nodes(child)


def _shardings_below(node: Any) -> Iterator[Any]:
    """Every sharding config in a tree."""
    for config in _nodes(node):
        if _kind(config).is_config and config.sharding_config is not None:
            yield config.sharding_config


def _gated_delta_heads(delta_net: Any, where: str) -> Heads:
    """A gated-delta layer declares no head counts: they follow from the width of its projections."""
    return {
        "TP003": _projected_heads(delta_net, "in_proj_q", "key_head_dim", where),
        "TP004": _projected_heads(delta_net, "in_proj_v", "value_head_dim", where),
    }


def _projected_heads(delta_net: Any, projection: str, head_dim: str, where: str) -> int:
    width = positive_int(getattr(delta_net, projection, None), "out_features", f"{where}.{projection}")
    return width // positive_int(delta_net, head_dim, where)


def _has_experts(config: Any) -> bool:
    return any(getattr(layer, "moe", None) is not None for layer in config.layers)


def _has_layer_list(config: Any) -> bool:
    return isinstance(getattr(config, "layers", None), (list, tuple))
