"""torchtitan 0.2.x: one set of model args describes every layer.

The plan is made of DTensors, which keep count of uneven shards: a routed expert's hidden size or the
vocabulary need not divide. What is reshaped into heads, or leaves the DTensor world between two linears
(the feed-forward), must.

Source: ``models/<m>/model/args.py`` (the counts) and ``models/<m>/infra/parallelize.py`` (the plan) of
torchtitan 0.2.0, 0.2.1 and 0.2.2.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

from torchtitan_tp_validate.checkpoint import DATA_LOADER
from torchtitan_tp_validate.degrees import TOKEN_FIELDS, Degrees
from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.layout import Run
from torchtitan_tp_validate.plan import Plan, PlanBuilder, Split
from torchtitan_tp_validate.releases import contracts, runs
from torchtitan_tp_validate.releases.base import RequestedModel, SpmdBackend, called_function
from torchtitan_tp_validate.releases.checkpoints import read_checkpoint, start_of
from torchtitan_tp_validate.releases.experts import Experts, note_experts, row_shards
from torchtitan_tp_validate.releases.hf_weights import permuted_heads, saves_transposed_experts
from torchtitan_tp_validate.releases.kv_replication import supports_args
from torchtitan_tp_validate.releases.reading import (
    Heads,
    attention_heads,
    family_name,
    positive_int,
    share_kv_heads,
    shortened,
)
from torchtitan_tp_validate.releases.sources import Source, installed_faults, source_of
from torchtitan_tp_validate.releases.validation import read_validation
from torchtitan_tp_validate.rules import Line

HOW_TO_CHANGE = (
    "--parallelism.{flag} {degree}, or in the job's TOML file:",
    "[parallelism]",
    "{flag} = {degree}",
)
CONFIG_REGISTRY = ""
KV_REPLICATION = "torchtitan_tp_validate.kv_replication.torchtitan_0_2"
TRAINER_MODULE = "torchtitan.train"
SPMD_BACKENDS: tuple[SpmdBackend, ...] = ()
CONTRACT = contracts.of_job_configs()

_HOW_TO_REPLICATE = "--replicate-kv-heads, or install(replicate_kv_heads=True)"

_HIDDEN_ROWS = ("w1", "w3", "mlp1_weight", "mlp1_bias")
"""The weights of routed experts whose second dimension is the hidden one."""


def is_job(job: Any) -> bool:
    """Return whether this is a ``JobConfig``."""
    return hasattr(job, "model") and hasattr(job, "experimental")


def named_model(job: Any) -> tuple[str, str]:
    """Return the model and the flavor that a job names."""
    return job.model.name, job.model.flavor


def requested_model(job: Any) -> RequestedModel | None:
    """Return the model that a job names, or None when torchtitan has none of that name and flavor."""
    if job.experimental.custom_import:
        # The Trainer imports it first too: it may register the model.
        importlib.import_module(job.experimental.custom_import)
    spec = _train_spec(job)
    if spec is None:
        return None
    args = spec.model_args.get(job.model.flavor)
    if args is None:
        return None
    name = f"{job.model.name} {job.model.flavor}"
    function = called_function(spec.parallelize_fn)
    return RequestedModel(name, args, function, has_pipelines=spec.pipelining_fn is not None)


def _fetches(config: Any) -> bool:
    """Whether args are the transformers backend's, which fetches a config as it updates them."""
    return hasattr(config, "_tt_to_hf_attribute_map")


def _train_spec(job: Any) -> Any:
    """Return what torchtitan has registered under the name of a job's model, or None."""
    train_spec = importlib.import_module("torchtitan.protocols.train_spec")
    try:
        return train_spec.get_train_spec(job.model.name)
    except ValueError:
        return None


def in_run(config: Any, run: Any) -> Any:
    """Return the job's model, built on meta: its args, which stand in for it else, do not tell all sizes."""
    model_cls = getattr(_train_spec(run), "model_cls", None)
    if model_cls is None or find_config(config) is None or _fetches(config):
        return config
    import torch

    try:
        args = runs.updated_args(config, run)
        if hasattr(args, "moe_args"):
            # It is turned off where there is no GPU for it: the run's own machine decides.
            args.moe_args.use_grouped_mm = config.moe_args.use_grouped_mm
        with torch.device("meta"):
            model = model_cls(args)
    except Exception:  # what the args do not tell is then left out, and said to be
        return config
    return model if find_config(model) is not None else config


def read_run(job: Any, model: RequestedModel, degrees: Degrees, broken: Collection[str]) -> Run:
    """Return what a ``JobConfig`` says of its run as a whole; see `releases.base.Release`."""
    pipeline = runs.read_pipeline(job.parallelism, is_supported=model.has_pipelines)
    checkpointing = getattr(getattr(job, "activation_checkpoint", None), "mode", "none")
    overlaps = getattr(job.parallelism, "pipeline_parallel_expert_parallel_overlap", False)
    pipeline = replace(pipeline, overlaps_experts=overlaps and checkpointing != "none")
    assets = job.model.hf_assets_path
    start = start_of(job.checkpoint, job.job.dump_folder, assets, empty_is_new=False)
    run = Run(
        degrees,
        Line.TORCHTITAN_0_2,
        pipeline,
        n_layers=getattr(model.config, "n_layers", None),
        # A model of somebody's own may have others.
        modules=_MODULES if model.parallelize_fn.__module__.startswith("torchtitan.") else (),
        shards_with_experts=_shards_with_experts(source_of(model.parallelize_fn)),
        has_every_mesh=not _ASKS_FOR_MESHES.is_installed,
        has_experts=_has_experts(model.config),
        mask_block=_MASK_BLOCK if getattr(model.config, "attn_type", "") == "flex" else None,
        **_uncut(model),
        shares_with_fsdp=getattr(model.config, "enable_weight_tying", False)
        and _ONE_GROUP.is_installed
        and _TIED_BEFORE_FSDP.is_installed,
        permuted_heads=permuted_heads(model.config, model.config, job.checkpoint, start),
        validation=read_validation(job, _train_spec(job), model.config, degrees),
        checkpoint=read_checkpoint(
            start,
            _not_loaded(job),
            partial(_build, model.config, job),
            lambda: _train_spec(job).state_dict_adapter(runs.updated_args(model.config, job), assets),
        ),
        faults=installed_faults(FAULT_SOURCES, _possible_faults(model, job, starts=start is None)),
        **runs.read_batches(job),
        **runs.read_backward(job),
    )
    refusal = ""
    if not _fetches(model.config):
        try:
            runs.updated_args(model.config, job)
        except Exception as error:  # what is not torchtitan's own is its to say
            refusal = runs.own_words(error)
    late = ""
    if not refusal and degrees.makes_a_mesh and degrees.etp in (1, degrees.tp) and "TP009" not in broken:
        known = {"model_args": model.config}
        late = runs.refusal_of(model.parallelize_fn, known, degrees, pipeline.degree, {"job_config": job})
    if not late and degrees.tp > 1:
        late = runs.async_refusal(model.parallelize_fn, job)
    return replace(run, refusal=refusal, late_refusal=late)


def _build(config: Any, job: Any) -> Any:
    """Return the job's model, on meta."""
    model = in_run(config, job)
    if model is config:
        raise PlanError("its args do not tell all sizes")
    return model


def _not_loaded(job: Any) -> tuple[str, ...]:
    """Return what a job does not load of a checkpoint."""
    # Of TorchFT's replicas each keeps its own.
    of_replicas = (DATA_LOADER,) if job.fault_tolerance.enable else ()
    return (*job.checkpoint.exclude_from_loading, *of_replicas)


def _uncut(model: RequestedModel) -> dict[str, Any]:
    """Return what of a model context parallelism does not cut, by field of `Run`."""
    if model.parallelize_fn.__module__.startswith("torchtitan.models.qwen3."):
        for source, uncut in _UNCUT.items():
            if source.is_installed:
                return {"uncut": uncut, "uncut_beside_tp": source is _DTENSORS}
    return {}


_DTENSORS = Source(
    "models/qwen3/infra/parallelize.py", "apply_cp_to_attention_module( # pyrefly: ignore [missing-attribute"
)
_UNCUT = {
    Source(
        "train.py", "cp_buffers=[inputs, labels] + [m.freqs_cis for m in model_parts]"
    ): "the Trainer asks the model for freqs_cis, which it does not have",
    Source(
        "train.py", 'if hasattr(model_parts[0], "freqs_cis"):'
    ): "the model's rope_cache stays whole, from the first position on",
    _DTENSORS: "the model's attention gets DTensors, which tensor parallelism has cut",
}


def _possible_faults(model: RequestedModel, job: Any, *, starts: bool) -> Iterator[str]:
    """Yield the codes of the faults that a model can have, by its flags and its function.

    Args:
        model: the model.
        job: that it is of.
        starts: whether its weights are drawn, and not loaded.
    """
    yield from ("CKPT001", "NUM008", "NUM009", "NUM015")
    if getattr(model.config, "enable_weight_tying", False) and "qwen3" in model.parallelize_fn.__module__:
        yield "NUM016"
    moe = getattr(model.config, "moe_args", None)
    if not _has_experts(model.config) or moe is None:
        return
    if saves_transposed_experts(model.config, job.checkpoint):
        yield "CKPT005"
    yield "NUM002"
    if not getattr(moe, "score_before_experts", True):
        yield "NUM001"
    if "gpt_oss" in model.parallelize_fn.__module__:
        yield "NUM003"
    if getattr(moe, "gate_bias", False) and starts:
        yield "NUM010"


_ONE_GROUP = Source(
    "distributed/fsdp/_fully_shard/_fsdp_state.py", "already managed by another FSDP group", package="torch"
)
_TIED_BEFORE_FSDP = Source(
    "models/qwen3/model/model.py",
    "bias=False) if self.enable_weight_tying: self.output.weight = self.tok_embeddings.weight",
)
"""torch refuses a parameter that two FSDP groups share; torchtitan makes two of a tie. 0.2.0 and 0.2.1, which
tie behind FSDP, give each group its own, until `to_empty` makes them one, and both gradients are added."""

_GATE = Source("models/llama4/infra/parallelize.py", '"moe.router.gate": NoParallel(),')
FAULT_SOURCES: Mapping[str, Source] = {
    "CKPT001": Source(
        "models/llama3/model/state_dict_adapter.py",
        "# HuggingFace permutation function (exact copy from their conversion script) def _permute(",
    ),
    "CKPT005": Source(
        "models/llama4/model/state_dict_adapter.py",
        "optimization purpose value = value.transpose(-1, -2) new_key = to_hf_map[key]",
    ),
    "NUM001": _GATE,
    "NUM002": _GATE,
    "NUM003": Source("models/gpt_oss/model/moe.py", 'if "tp" in mesh_dim_names:'),
    "NUM008": Source("train.py", "(torch.sum(torch.stack(losses)) / global_valid_tokens)"),
    "NUM009": Source(
        "train.py", "global_valid_tokens=global_valid_tokens, ) accumulated_losses.append(loss.detach())"
    ),
    "NUM015": runs.SPLIT_BACKWARD,
    "NUM016": Source(
        "models/qwen3/model/model.py",
        "# If weight tying is enabled, we don't need to initialize the output layer",
    ),
    "NUM010": Source(
        "models/moe/moe.py",
        "trunc_normal_(self.gate.weight, mean=0.0, std=init_std) "
        "# NOTE: the reason we make this a stateless module",
    ),
}
"""Code -> the fault in the source of the releases that have it."""

_MASK_BLOCK = 128
"""Tokens of a block of a flex attention mask: ``create_attention_mask`` leaves it to torch."""

_MODULES = ("tok_embeddings", "norm", "output")
_SHARDS_WITH_EXPERTS = "if parallel_dims.fsdp_enabled or parallel_dims.ep_enabled:"
_SHARDS_WITH_DATA = "if parallel_dims.fsdp_enabled:"
"""What a parallelize function asks before it applies FSDP; the first takes its mesh for granted."""
_ASKS_FOR_MESHES = Source(
    "distributed/parallel_dims.py", "mesh = self.get_optional_mesh(dims) if mesh is None:"
)
"""ParallelDims then has no mesh of one rank; that of 0.2.0 has."""


def flavors(
    package: ModuleType, model_package: Callable[[], ModuleType]
) -> dict[str, Callable[[], RequestedModel]] | None:
    """Return the flavors of a package's train spec; see `releases.base.Release`."""
    del model_package
    if not hasattr(package, "get_train_spec"):
        return None
    spec = package.get_train_spec()
    return {
        flavor: partial(RequestedModel, flavor, args, called_function(spec.parallelize_fn))
        for flavor, args in spec.model_args.items()
    }


def find_config(model_or_config: Any) -> Any | None:
    """Return the model args of a model, or the model args themselves, or None when this is neither."""
    args = getattr(model_or_config, "model_args", model_or_config)
    return args if hasattr(args, "n_heads") else None


def read(args: Any, model: Any, degrees: Degrees) -> Plan:
    """Return the plan that ``parallelize_*`` of 0.2.x applies to a model with these args.

    Args:
        args: the model args.
        model: what the args were found on. A built layer is believed over the args: it knows its own
            head counts, and its feed-forward size, which the args give only by a formula.
        degrees: what the run asks for: it matters to the sequence and to routed experts.
    """
    name = type(args).__name__
    n_layers = positive_int(args, "n_layers", name)
    declared = attention_heads(args, name)
    built = dict(_layers(model))
    findings, shared = PlanBuilder(Line.TORCHTITAN_0_2), PlanBuilder(Line.TORCHTITAN_0_2)
    has_mlp = False
    for index in range(n_layers):
        layer = built.get(index)
        heads = _heads(layer, declared, index)
        for code, size in heads.items():
            findings.add(code, size, layers=(index,))
        if "TP002" in heads and supports_args(args):
            head_dim = getattr(args, "head_dim", None) or args.dim // args.n_heads
            share_kv_heads(shared, heads["TP002"], head_dim, (index,))
        if layer is not None:
            has_mlp |= _read_mlp(layer, index, findings, degrees)
    if not has_mlp:
        findings.leave_out("TP005: the feed-forward's size is known when the model is built")
    read_sequence(findings, degrees)
    vocab_size = getattr(args, "vocab_size", None)
    if isinstance(vocab_size, int) and vocab_size > 0:
        findings.add("TP006", vocab_size, place="tok_embeddings, output", split=Split.NOT_EMPTY)
    else:
        findings.leave_out(f"TP006: {name}.vocab_size is {shortened(vocab_size)}")
    num_experts = getattr(getattr(args, "moe_args", None), "num_experts", None)
    has_experts = _has_experts(args)
    if has_experts and num_experts:
        findings.add("EP001", num_experts, place="every MoE layer")
    elif has_experts:
        findings.leave_out(f"EP001: {name}.moe_args.num_experts is {shortened(num_experts)}")
    plan = Plan(
        model=family_name(args, has_experts=has_experts),
        dims=findings.dims(),
        n_layers=n_layers,
        how_to_change=HOW_TO_CHANGE,
        how_to_replicate=_HOW_TO_REPLICATE,
        shared_kv=shared.dims(),
        not_judged=tuple(findings.not_judged),
    )
    return plan.of_own_function() if degrees.by_own_function else plan


def _shards_with_experts(function: str) -> bool | None:
    """Return `Run.shards_with_experts` of a parallelize function's source."""
    return True if _SHARDS_WITH_EXPERTS in function else False if _SHARDS_WITH_DATA in function else None


def _has_experts(args: Any) -> bool:
    num_experts = getattr(getattr(args, "moe_args", None), "num_experts", None)
    return bool(getattr(args, "moe_enabled", num_experts))


def read_sequence(findings: PlanBuilder, degrees: Degrees) -> None:
    """Note what the sequence must fit: ``ParallelDims.seq_len_divisor``, without context parallelism too."""
    if degrees.seq_len is None:
        findings.leave_out(f"TP009: no {TOKEN_FIELDS[0]} is given")
    else:
        findings.add("TP009", degrees.seq_len, place="training.seq_len", multiple=2 * degrees.cp)


def _layers(model: Any) -> Iterator[tuple[int, Any]]:
    """``(index, module)`` of the layers that this model, or pipeline stage, holds."""
    layers: Any = getattr(model, "layers", None)
    for index, layer in layers.items() if hasattr(layers, "items") else ():
        yield int(index), layer


def _heads(layer: Any, declared: Heads, index: int) -> Heads:
    attention = _child(layer, "attention")
    if not hasattr(attention, "n_heads"):
        return declared
    heads = attention_heads(attention, f"layers.{index}.attention")
    # A built layer has n_kv_heads filled in where the args leave it to n_heads.
    return declared if _resolved(heads) == _resolved(declared) else heads


def _resolved(heads: Heads) -> tuple[int, int]:
    return heads["TP001"], heads.get("TP002", heads["TP001"])


def _read_mlp(layer: Any, index: int, findings: PlanBuilder, degrees: Degrees) -> bool:
    """Note what is split after attention; whether there is anything."""
    moe = _child(layer, "moe")
    dense, shared = _child(layer, "feed_forward"), _child(moe, "shared_experts")
    for code, mlp, name in (("TP005", dense, "feed_forward"), ("TP010", shared, "moe.shared_experts")):
        size = getattr(_child(mlp, "w1"), "out_features", None)
        if size is not None:
            findings.add(code, size, layers=(index,))
        elif mlp is not None:
            findings.leave_out(f"{code}: layers.{index}.{name}.w1 has no out_features")
    if moe is not None and not _read_experts(_child(moe, "experts"), index, findings, degrees):
        findings.leave_out(f"TP011, TP013, FSDP001: layers.{index}.moe.experts has no weight of a known name")
    return dense is not None or moe is not None


def _read_experts(experts: Any, index: int, findings: PlanBuilder, degrees: Degrees) -> bool:
    """Note what is split of a layer's experts; whether their weights are known."""
    shapes = {name: weight.shape for name, weight in getattr(experts, "_parameters", {}).items()}
    fused = "mlp1_weight" in shapes
    first = shapes.get("mlp1_weight" if fused else "w1")
    if first is None:
        return False
    num_experts, hidden = first[0], first[1] // 2 if fused else first[1]
    # Under EP the hidden dimension is whole, but for tensor parallelism within experts.
    cut = degrees.ep == 1 or degrees.etp > 1
    if fused and cut:
        # gpt_oss: one weight holds both halves of the gated projection, and is split beside the second one.
        findings.add("TP011", hidden, layers=(index,), split=Split.IN_STEP)
    hidden_name = "2 * expert_hidden_dim" if fused else "expert_hidden_dim"
    rows = tuple(
        (hidden_name, shape[1], cut) if name in _HIDDEN_ROWS else ("dim", shape[1], False)
        for name, shape in shapes.items()
    )
    shards = None
    if degrees.ep > 1:
        ranks = degrees.dp_shard * degrees.cp * degrees.tp // degrees.etp
        shards = row_shards(degrees, num_experts, ranks=ranks)
    grouped = getattr(experts, "use_grouped_mm", False)
    read = Experts(hidden, rows, grouped=grouped)
    note_experts(findings, read, degrees, (index,), tp=degrees.tp, row_shards=shards)
    return True


def _child(module: Any, name: str) -> Any:
    """Return a submodule or None; ``getattr`` of a module without it is slow, and there are hundreds."""
    children = getattr(module, "_modules", None)
    return getattr(module, name, None) if children is None else children.get(name)
