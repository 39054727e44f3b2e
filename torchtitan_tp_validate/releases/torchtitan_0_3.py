"""torchtitan 0.3.x: a config tree describes the model.

In 0.3.x every module's config may carry a ``sharding_config`` that says which dimension of which
parameter is split over which mesh axis. That is what is read: a model that nobody told us about is
judged by the same rule. Head counts are declared beside it (``layers[i].attention.n_kv_heads``); a
gated-delta layer has no attention but a ``delta_net``.

Source: ``models/common/decoder.py`` and ``models/qwen3_5/model.py`` of torchtitan 0.3.0.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from torchtitan_tp_validate.degrees import TOKEN_BUDGET, Axis, Degrees, token_field
from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.layout import Run
from torchtitan_tp_validate.plan import Plan, PlanBuilder, ShardedDim
from torchtitan_tp_validate.releases import config_tree, contracts, declarations, rows, runs
from torchtitan_tp_validate.releases.base import RequestedModel, called_function
from torchtitan_tp_validate.releases.checkpoints import read_checkpoint, saves_optimizer, start_of
from torchtitan_tp_validate.releases.experts import Experts, note_experts, row_shards
from torchtitan_tp_validate.releases.hf_weights import permuted_heads, saves_transposed_experts
from torchtitan_tp_validate.releases.kv_replication import problem_with_attention
from torchtitan_tp_validate.releases.reading import (
    Heads,
    attention_heads,
    family_name,
    positive_int,
    share_kv_heads,
)
from torchtitan_tp_validate.releases.rows import (
    backend_of,
    line_of,
    note_rows,
    note_sequence,
    splits_sequence,
)
from torchtitan_tp_validate.releases.sources import Source, installed_faults
from torchtitan_tp_validate.releases.validation import is_of_text, read_validator

HOW_TO_CHANGE = (
    "--parallelism.{flag} {degree}, or in the config registry:",
    "parallelism=ParallelismConfig({flag}={degree})",
)
CONFIG_REGISTRY = "config_registry"
KV_REPLICATION = "torchtitan_tp_validate.kv_replication.torchtitan_0_3"
TRAINER_MODULE = "torchtitan.trainer"
SPMD_BACKENDS = rows.SPMD_BACKENDS
CONTRACT = contracts.of_config_trees(
    runs.SIZES[0], gated_delta="models/qwen3_5/model.py", absent=("num_pp_microbatches",)
)

_HOW_TO_REPLICATE = "--replicate-kv-heads, or converters=[ReplicateKVHeads.Config()]"

_EXPERTS = "routed_experts.inner_experts"
"""Where torchtitan's FSDP looks for the weights of a layer's experts."""
_OF_KV_HEADS = (".wk", ".wv", ".wkv")
"""What projects to key-value heads alone."""


def is_job(job: Any) -> bool:
    """Return whether this is a ``Trainer.Config`` that counts its batches in sequences."""
    return hasattr(job, "model_spec") and not hasattr(getattr(job, "training", None), TOKEN_BUDGET)


def named_model(job: Any) -> None:
    """Return None: a job carries its model."""


def requested_model(job: Any) -> RequestedModel | None:
    """Return the model that a job carries, or None."""
    spec = job.model_spec
    return None if spec is None else _described(spec)


def flavors(
    package: ModuleType, model_package: Callable[[], ModuleType]
) -> dict[str, Callable[[], RequestedModel]] | None:
    """Return what a package's ``model_registry`` gives, by flavor; see `releases.base.Release`."""
    registry = getattr(package, "model_registry", None)
    if registry is None:
        return None
    table = _flavor_table(package) or _flavor_table(model_package())
    return {flavor: functools.partial(_flavor, registry, flavor) for flavor in table}


def _flavor(registry: Callable[[str], Any], flavor: str) -> RequestedModel:
    return _described(registry(flavor))


def _flavor_table(package: ModuleType) -> dict[str, Any]:
    """Return the one table of flavors that a package has, or an empty one."""
    tables: list[dict[str, Any]] = [
        value
        for key, value in vars(package).items()
        if key.endswith(("_configs", "flavors")) and isinstance(value, dict)
    ]
    return tables[0] if len(tables) == 1 else {}


def _described(spec: Any) -> RequestedModel:
    has_pipelines = getattr(spec, "pipelining_fn", None) is not None
    function = called_function(spec.parallelize_fn)
    return RequestedModel(f"{spec.name} {spec.flavor}", spec.model, function, has_pipelines)


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
    """Return what to judge of a job: its model's config, with its run where that can make a difference."""
    return InRun(config, run) if _is_tree(config) else config


_GRAPH_PP = "torchtitan.experiments.graph_trainer.graph_pp"
_WRITES = Source("experiments/graph_trainer/graph_pp/runner.py", "stage.fwd_cache[mb_index] =")
_STAGE_CACHE = Source("distributed/pipelining/stage.py", "self.fwd_cache", package="torch")


def read_run(job: Any, model: RequestedModel, degrees: Degrees, broken: Collection[str]) -> Run:
    """Return what a ``Trainer.Config`` says of its run as a whole; see `releases.base.Release`."""
    pipeline = runs.read_pipeline(job.parallelism, is_supported=model.has_pipelines)
    splits_by = getattr(getattr(job, "model_spec", None), "pipelining_fn", None)
    if getattr(splits_by, "__module__", "").startswith(_GRAPH_PP):
        pipeline = replace(pipeline, lacks_cache=_WRITES.is_installed and not _STAGE_CACHE.is_installed)
    config = model.config
    classes = _class_names(config)
    # Its sharding does not ask whether it is off.
    splits = degrees.sequence_parallel or "Qwen35Model.Config" in classes
    run = Run(
        replace(degrees, sequence_parallel=splits),
        line_of(degrees),
        pipeline,
        n_layers=len(config.layers) if _is_tree(config) else None,
        modules=tuple(name for name in _MODULES if getattr(config, name, None) is not None),
        **runs.read_batches(job),
        **runs.read_backward(job),
    )
    asks = "special_tokens" if "Qwen35Model.Config" in classes and _LOOKS_UP_TOKENS.is_installed else ""
    heads, section = None, getattr(job, "checkpoint", None)
    assets = getattr(job, "hf_assets_path", "")
    start = start_of(section, getattr(job, "dump_folder", ""), assets, empty_is_new=True)
    if _is_tree(config) and config.layers:
        heads = permuted_heads(config, getattr(config.layers[0], "attention", None), section, start)
    run = replace(
        run,
        has_experts=_is_tree(config) and _has_experts(config),
        changes_embedding=_changes_embedding(config),
        unfed=asks if is_of_text(getattr(job, "dataloader", None)) else "",
        validation=read_validator(job, asks, in_a_row=run.sizes.in_a_row),
        permuted_heads=heads,
        checkpoint=read_checkpoint(
            start,
            getattr(section, "exclude_from_loading", ()),
            functools.partial(_build, config),
            lambda: job.model_spec.state_dict_adapter(config, assets),
        ),
        faults=installed_faults(FAULT_SOURCES, _possible_faults(model, classes, job)),
        full_dtensor=degrees.spmd_backend == "full_dtensor",
        mask_block=_mask_block(config),
    )
    wraps_attention = backend_of(degrees).wraps_attention
    if degrees.cp > 1:
        refused = _WHOLE_SEQUENCE[:1] if wraps_attention else _WHOLE_SEQUENCE
        whole = tuple(name for name in refused if f"{name}.Config" in classes)
        run = replace(run, whole_sequence=whole)
    run = replace(run, wraps_attention=wraps_attention)
    groups = getattr(getattr(job, "optimizer", None), "param_groups", ())
    patterns = tuple(group.pattern for group in groups)
    if patterns not in ((), (_ANYTHING,)):
        run = replace(run, patterns=patterns, parameters=_parameter_names(config))
    # Its own look at the heads and the experts would say less than is said already.
    asked = degrees.vary(tp=1, ep=1) if broken else degrees
    objection = _objection(in_run(config, job), asked)
    refusal = "" if objection is None else runs.own_words(objection)
    objected = "" if objection is None or refusal else declarations.REFUSED.format(objection)
    late, built = "", declarations.as_built(config, job, degrees)
    if built is not None and not refusal and degrees.makes_a_mesh and "TP009" not in broken:
        given = {
            parameter: getattr(job, section)
            for parameter, section in _SECTIONS.items()
            if hasattr(job, section)
        }
        late = runs.refusal_of(model.parallelize_fn, {"config": built}, degrees, pipeline.degree, given)
    return replace(run, refusal=refusal, late_refusal=late, objection=objected)


def _build(config: Any) -> Any:
    """Return the model of a config, on meta."""
    import torch

    if not _is_tree(config):
        raise PlanError("its config is completed when it is built")
    with torch.device("meta"):
        return copy.deepcopy(config).build()


_ANYTHING = r".*"
_WHOLE_SEQUENCE = ("VarlenAttention", "ScaledDotProductAttention")
"""What takes no part of a sequence: the first on no backend, the other where attention is not wrapped.

Source: ``distributed/context_parallel/api.py``, ``distributed/full_dtensor.py`` (``validate_config``)."""


def _mask_block(config: Any) -> int | None:
    """Return the tokens of a block of the flex attention masks of a model's layers, or None without one."""
    sizes = {
        node.block_size
        for layer in (config.layers if _is_tree(config) else ())
        for node in config_tree.nodes(layer)
        if any(base.__qualname__ == "FlexAttention.Config" for base in type(node).__mro__)
    }
    return math.lcm(*(size if isinstance(size, int) else size[0] for size in sizes)) if sizes else None


def _changes_embedding(config: Any) -> bool:
    """Return whether a norm, or the features of images, come between the embedding and the first layer."""
    embedding = getattr(config, "tok_embeddings", None)
    return getattr(config, "vision_encoder", None) is not None or hasattr(embedding, "norm")


def _parameter_names(config: Any) -> tuple[str, ...]:
    """Return the names of all parameters of the model that a config describes.

    A search judges hundreds of jobs with one model, which takes half a second to build: it is built once.
    """
    import torch

    described = repr(config)
    if described not in _NAMES:
        with torch.device("meta"):
            model = copy.deepcopy(config).build()
        _NAMES[described] = tuple(name for name, _ in model.named_parameters())
    return _NAMES[described]


_NAMES: dict[str, tuple[str, ...]] = {}
"""What describes a model -> the names of its parameters."""


def _possible_faults(model: RequestedModel, classes: Collection[str], job: Any) -> Iterator[str]:
    """Yield the codes of the faults that a model can have, by what it is made of, and by its function."""
    # A vision encoder has such linears too; without images nothing of it is trained.
    layers = getattr(model.config, "layers", ())
    layer_classes = {name for layer in layers for name in _class_names(layer)}
    function = model.parallelize_fn.__module__
    checkpoint = getattr(job, "checkpoint", None)
    yield from ("CKPT001", "NUM006", "NUM014", "NUM015")
    if saves_transposed_experts(model.config, checkpoint):
        yield "CKPT005"
    has_vision = getattr(model.config, "vision_encoder", None) is not None
    if (
        has_vision
        and is_of_text(getattr(job, "dataloader", None))
        and saves_optimizer(checkpoint, job.training.steps)
    ):
        yield "CKPT006"
    if "GptOssGroupedExperts.Config" in classes:
        yield "NUM004"
    if "ScaledBiasRowwiseLinear.Config" in layer_classes:
        yield "NUM005"
    if any(name.startswith("Frozen") for name in classes):
        yield "NUM007"
    if "transformers_modeling_backend" in function and not _names_rope_init_fn():
        yield "NUM011"


def _class_names(config: Any) -> set[str]:
    """Return the names of the classes of a config and of all below it, and of what they extend."""
    return {base.__qualname__ for node in config_tree.nodes(config) for base in type(node).__mro__}


def _names_rope_init_fn() -> bool:
    """Return whether the installed transformers keeps the function that torchtitan's backend looks for."""
    source = Source("models/llama/modeling_llama.py", "self.rope_init_fn", package="transformers")
    return source.is_installed


FAULT_SOURCES: Mapping[str, Source] = {
    "CKPT001": Source(
        "models/llama3/state_dict_adapter.py",
        "# HuggingFace permutation function (exact copy from their conversion script) def _permute(",
    ),
    "CKPT005": Source(
        "models/qwen3_5/state_dict_adapter.py", "hf_state_dict[hf_key] = value.transpose(-2, -1) continue"
    ),
    "CKPT006": Source("components/optimizer/utils.py", "if optim.state: return"),
    "NUM004": Source(
        "models/gpt_oss/moe.py",
        "tp_degree = 1 if isinstance(self.mlp1_weight_EGD, DTensor): mesh_dim_names",
        later=(
            'if get_spmd_backend() == "spmd_types": tp_degree = spmd_mesh_size("tp")',
            "# Don't scale the gradient - pass it through as-is return grad_output, None, None",
        ),
    ),
    "NUM005": Source(
        "models/common/linear.py",
        "self.bias.to_local() if isinstance(self.bias, DTensor) else self.bias bias = bias / self.tp_degree",
    ),
    "NUM006": Source(
        "distributed/tensor/experimental/_func_map.py",
        "if isinstance(local_arg, AsyncCollectiveTensor): local_arg = local_arg.wait()",
        package="torch",
    ),
    "NUM007": Source("protocols/module.py", "self.register_parameter(name, nn.Parameter(tensor))"),
    "NUM011": Source(
        "experiments/transformers_modeling_backend/model.py",
        'rope_init_fn = getattr(module, "rope_init_fn", None)',
    ),
    "NUM015": runs.SPLIT_BACKWARD,
    "NUM014": Source(
        "distributed/pipelining/stage.py",
        "if isinstance(g, torch.Tensor): processed_metas.append(extract_tensor_meta(g))",
        package="torch",
    ),
}
"""Code -> the fault in the source of the releases that have it."""

_LOOKS_UP_TOKENS = Source("models/qwen3_5/model.py", 'image_token_id = special_tokens["image_id"]')
"""Of 0.3.0, whether there are images or not."""

_SECTIONS = {
    "training": "training",
    "parallelism": "parallelism",
    "compile_config": "compile",
    "ac_config": "activation_checkpoint",
    "dump_folder": "dump_folder",
}
"""Parameter of a parallelize function -> the section of the job that it is given."""

_MODULES = ("tok_embeddings", "norm", "lm_head")


def _objection(model_or_config: Any, degrees: Degrees) -> Exception | None:
    """Return what torchtitan raises as it takes a model with its run, or None."""
    if not isinstance(model_or_config, InRun) or not declarations.declares_later(model_or_config.config):
        return None
    return declarations.objection(model_or_config.config, model_or_config.run, degrees)


def find_config(model_or_config: Any) -> ConfigTree | None:
    """Return the config tree of a model, or the tree itself, or None when this is neither.

    Modules are built from the tree, so the tree is the truth: nothing else of a model is looked at.
    """
    config = getattr(model_or_config, "config", model_or_config)
    run = model_or_config.run if isinstance(model_or_config, InRun) else None
    return ConfigTree(config, run) if _is_tree(config) else None


def read(tree: ConfigTree, model: Any, degrees: Degrees) -> Plan:
    """Return the plan that the model's parallelization applies to a model with this config tree."""
    del model
    return tree.plan(degrees)


class ConfigTree:
    """A config tree, and what was read of it.

    It is walked once for all degrees at which the same shardings are declared: what else depends on the
    degrees is added to what was found there.
    """

    def __init__(self, config: Any, run: Any) -> None:
        self._config = config
        self._run = run
        self._readings: dict[tuple[bool, str], _Reading] = {}

    def plan(self, degrees: Degrees) -> Plan:
        """Return the plan at these degrees.

        Raises:
            PlanError: something of the tree is not what a config is.
        """
        config = self._config
        # torchtitan's sharding configs know of a backend, and whether experts are spread over ranks.
        declares = degrees.ep > 1, degrees.spmd_backend
        if declares not in self._readings:
            declared = config
            if declarations.declares_later(config):
                declared = declarations.with_shardings(config, degrees, self._run)
            self._readings[declares] = _Reading(degrees, declared)
        plan = self._readings[declares].plan(config, degrees)
        # A converted config says so itself, and a patched torchtitan's run, whatever was asked for.
        if hasattr(config, "replicates_kv_heads") or declarations.shares_kv_heads(self._run):
            return plan.with_kv_replication()
        # --replicate-kv-heads is for torchtitan's own functions, and so is not offered.
        return replace(plan, shared_kv=()) if degrees.by_own_function else plan


class _Reading:
    """One walk through a config tree."""

    def __init__(self, degrees: Degrees, config: Any) -> None:
        """Read a tree: its layers by index, multi-token-prediction layers at the end."""
        self.findings = PlanBuilder(line_of(degrees))
        self.shared_kv = PlanBuilder(line_of(degrees))
        self.all_share = True
        self.unread: list[str] = []
        self._experts: list[_LayerExperts] = []
        self._degrees = degrees
        layers = (*config.layers, *getattr(config, "mtp_layers", ()))
        self._n_layers = len(layers)
        for name, part in config_tree.parts(config):
            if name not in ("layers", "mtp_layers"):
                self._node(part, name, ())
                self._vision_heads(part, name)
        for layer, indices in config_tree.alike(layers):
            self._layer(layer, f"layers[{indices[0]}]", tuple(indices))

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

    def _vision_heads(self, encoder: Any, name: str) -> None:
        """Notice when a vision encoder is split, and nothing in it told how many heads it has."""
        found = any(dim.code == "TP007" for dim in self.findings.dims())
        if "vision" in name and not found and config_tree.declares_shardings(encoder):
            self.findings.leave_out(f"TP007: nothing in {name} has num_heads beside wq")

    def _layer(self, layer: Any, path: str, layers: tuple[int, ...]) -> None:
        attention, delta_net = getattr(layer, "attention", None), getattr(layer, "delta_net", None)
        if self._is_whole(attention if delta_net is None else delta_net):
            heads = {}
        elif hasattr(attention, "n_heads"):
            heads = attention_heads(attention, f"{path}.attention")
        elif delta_net is not None:
            heads = _gated_delta_heads(delta_net, f"{path}.delta_net")
        else:
            heads = {}
            if not config_tree.declares_shardings(layer):
                self.unread += (f"layers[{index}]" for index in layers)
            elif attention is not None and config_tree.declares_shardings(attention):
                self.findings.leave_out(f"TP001, TP002: {path}.attention has no n_heads")
        self._heads(heads, layers)
        if attention is not None and "TP002" in heads:
            self._share(attention, heads["TP002"], layers)
        for name, part in config_tree.parts(layer):
            mixer = name in ("attention", "delta_net")
            self._node(part, f"{path}.{name}", layers, tuple(heads.values()) if mixer else ())

    def _is_whole(self, mixer: Any) -> bool:
        """Return whether the shardings of a tree leave the heads of a layer whole, on every rank."""
        declared = [node for node in config_tree.nodes(mixer) if getattr(node, "sharding_config", None)]
        return bool(declared) and not any(
            axis is Axis.TP for node in declared for axis, *_ in config_tree.cuts(node)
        )

    def _share(self, attention: Any, n_kv_heads: int, layers: tuple[int, ...]) -> None:
        """Note what KV-head replication asks for in these layers, if all layers can have it."""
        self.all_share &= problem_with_attention(attention) is None
        if self.all_share:
            # In some commits of main a config has no dim before it is built: nothing is offered then.
            head_dim = attention.head_dim or getattr(attention, "dim", 0) // attention.n_heads
            self.all_share = head_dim > 0
        if self.all_share:
            share_kv_heads(self.shared_kv, n_kv_heads, head_dim, layers)

    def _heads(self, heads: Heads, layers: tuple[int, ...]) -> None:
        for code, size in heads.items():
            self.findings.add(code, size, layers=layers)

    def _node(self, node: Any, path: str, layers: tuple[int, ...], heads: tuple[int, ...] = ()) -> None:
        """Read a config and all below it; ``heads`` are the head counts that its parameters are made of."""
        if getattr(node, "sharding_config", None) is not None:
            self._declared(node, path, layers, heads)
        if hasattr(node, "num_heads") and hasattr(node, "wq"):
            heads = (positive_int(node, "num_heads", path),)
            self.findings.add("TP007", heads[0], layers=layers, place=path)
        for name, child in config_tree.children(node):
            self._node(child, f"{path}.{name}", layers, heads)

    def _declared(self, node: Any, path: str, layers: tuple[int, ...], heads: tuple[int, ...]) -> None:
        """Note what a module's own sharding config splits."""
        shapes = config_tree.built(node).shapes
        cuts = list(config_tree.cuts(node))
        for axis, name, _ in cuts:
            # A bias is there or not; a sharding for one says nothing about a module without.
            if name not in shapes and not name.endswith("bias"):
                what = "EP001" if axis is Axis.EP else "TP012"
                self.findings.leave_out(f"{what}: {path}.{name} is not there")
        splits = [(axis, name, shapes[name][dim]) for axis, name, dim in cuts if name in shapes]
        sizes = {size for axis, _, size in splits if axis is Axis.TP}
        if path.endswith(_EXPERTS):
            self._note_experts(
                node, {n for axis, n, dim in cuts if axis is Axis.TP and dim == 1}, layers, path
            )
        block = config_tree.block_size(node)
        for axis, name, size in splits:
            if axis is Axis.EP:
                self.findings.add("EP001", size, layers=layers)
                continue
            # Each rank has whole key-value heads, even where several share one: these are whole blocks then.
            kv_heads = heads[-1] if heads and path.endswith(_OF_KV_HEADS) else 0
            if block and not (kv_heads and size // kv_heads % block == 0):
                label = f"{_in_layer(path, bool(layers))}.{name}"
                self.findings.add("TP015", size, layers=layers, place=path, label=label, multiple=block)
            # What is made of whole heads is split like them, and the double like its half.
            implied = any(size % count == 0 for count in heads) or size / 2 in sizes
            if not implied:
                self._split(node, size, f"{path}.{name}", layers, has_double=2 * size in sizes)

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

    def _note_experts(self, node: Any, cut: set[str], layers: tuple[int, ...], path: str) -> None:
        """Keep what FSDP and the grouped product ask about; ``cut`` are the weights whose rows TP splits."""
        if not hasattr(node, "hidden_dim"):
            self.findings.leave_out(f"TP013, FSDP001: {path} has no hidden_dim")
            return
        built = config_tree.built(node)
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
        if degrees.ep > 1 or not backend_of(degrees).shards_over_data_only:
            ranks *= degrees.tp
        if degrees.ep == 1:
            ranks *= degrees.dp_replicate
        shards = row_shards(degrees, self.num_experts, ranks=ranks)
        note_experts(findings, self.experts, degrees, self.layers, tp=degrees.tp, row_shards=shards)


def _row_name(node: Any, size: int) -> str:
    """Return what an expert weight's second dimension of this size is called; gpt_oss has a double one."""
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
    """Return a path from the layer on, for those that are in one."""
    return path.partition("].")[2] if in_layer else path


def _gated_delta_heads(delta_net: Any, where: str) -> Heads:
    """Return the heads of a gated-delta layer, which follow from the width of its projections."""
    return {
        "TP003": _projected_heads(delta_net, "in_proj_q", "key_head_dim", where),
        "TP004": _projected_heads(delta_net, "in_proj_v", "value_head_dim", where),
    }


def _projected_heads(delta_net: Any, projection: str, head_dim: str, where: str) -> int:
    width = positive_int(getattr(delta_net, projection, None), "out_features", f"{where}.{projection}")
    return width // positive_int(delta_net, head_dim, where)


def _has_experts(config: Any) -> bool:
    return any(getattr(layer, "moe", None) is not None for layer in config.layers)


def _is_tree(config: Any) -> bool:
    return isinstance(getattr(config, "layers", None), (list, tuple))
