"""The jobs of torchtitan 0.3.x, made small, and its Trainer on the CPU."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_tp_validate.degrees import Degrees, degrees_of_job
from torchtitan_tp_validate.errors import RehearsalError, ShrinkError
from torchtitan_tp_validate.hardware import build_for_its_hardware
from torchtitan_tp_validate.rehearsal.cpu import choose_cpu
from torchtitan_tp_validate.rehearsal.jobs import (
    EPSILON,
    LAYERS_PER_RANK,
    OF_THE_OPTIMIZER,
    Request,
    pp,
    small_seq_len,
    transformers_backend,
)
from torchtitan_tp_validate.rehearsal.jobs.batch import Batch, read_batch, set_batch
from torchtitan_tp_validate.rehearsal.shrink import configs_below, shrink
from torchtitan_tp_validate.releases.validation import is_of_text

_DISPATCHES_ON_A_GPU = (
    *("DeepEPTokenDispatcher", "HybridEPTokenDispatcher", "MinimalAsyncEPTokenDispatcher"),
    # Pads, for the grouped products of low precision.
    "TorchAOTokenDispatcher",
)
_MOST_PARAMETERS = 50_000_000
"""Of a model that is rehearsed as it is: more take too long on a CPU."""

_LOW_PRECISION = "torchtitan.components.quantization."


def prepare(compile: bool) -> set[str]:
    """Make the CPU torchtitan's device; see `jobs`."""
    choose_cpu(compile)
    from torchtitan_tp_validate.rehearsal.models import torchtitan_0_3
    from torchtitan_tp_validate.rehearsal.redistributions import remember_next_placements
    from torchtitan_tp_validate.rehearsal.stand_ins import (
        attend_by_mask,
        attend_for_transformers,
        run_each_document,
    )

    torchtitan_0_3.run_on_cpu()
    remember_next_placements()
    used: set[str] = set()
    attend_by_mask(used)
    attend_for_transformers(used)
    run_each_document(used)
    return used


def parse(request: Request) -> Any:
    """Return the ``Trainer.Config`` that is asked for; see `jobs`."""
    if request.arguments:
        from torchtitan_tp_validate.job import parse_command_line

        return build_for_its_hardware(lambda: parse_command_line(request.arguments))[0]
    from torchtitan.config import ParallelismConfig

    from torchtitan_tp_validate import registry

    found = registry.model(request.model).spec(request.flavor)
    job = _job_of(registry.configs(request.model).values(), request.flavor)
    job.model_spec = dataclasses.replace(job.model_spec, flavor=request.flavor, model=found.config)
    parallelism = job.parallelism = ParallelismConfig()
    for field, value in request.degrees:
        setattr(parallelism, field, value)
    job.compile.enable = request.compile
    # The batch is not asked about: one for every stage.
    batch = read_batch(job)
    set_batch(job, dataclasses.replace(batch, local=2 * pp(job) * batch.microbatch))
    return job


def _job_of(builders: Iterable[Callable[[], Any]], flavor: str) -> Any:
    """Return the flavor's own job if there is one: its loss and optimizer go with the model."""
    first = None
    for build in builders:
        job, _ = build_for_its_hardware(build)
        if job.model_spec.flavor == flavor:
            return job
        first = first or job
    return first


def make_small(job: Any, degrees: Degrees, folder: Path) -> list[str]:
    """Shrink the job's model and sequence; see `jobs`."""
    from torchtitan.components.optimizer import default_adamw

    layers = LAYERS_PER_RANK * pp(job) if pp(job) > 1 else 1
    config = job.model_spec.model
    if transformers_backend.is_job(config):
        left_out: list[str] = []
        job.hf_model = transformers_backend.make_small(config, job.hf_model, degrees, layers, folder)
    else:
        left_out = _replace_gpu_kernels(config)
        try:
            config = shrink(config, degrees, least_layers=layers)
        except ShrinkError as error:
            _check_is_small(config, error)
    job.model_spec = dataclasses.replace(job.model_spec, model=config)
    if job.optimizer.optimizer_factory_kwargs_by_name:
        # DistMuon runs on CUDA only, and lays out every parameter of the model that it was made for.
        left_out.append(f"AdamW for {' and '.join(job.optimizer.optimizer_factory_kwargs_by_name)}")
        job.optimizer = default_adamw()
    for group in job.optimizer.param_groups:
        group.optimizer_kwargs = {**group.optimizer_kwargs, "eps": EPSILON}
    left_out.append(OF_THE_OPTIMIZER)
    training, tokens = job.training, degrees_of_job(job).seq_len
    assert tokens is not None, "every line says how many tokens are split"
    # Losses that go chunk by chunk cut it too.
    seq_len = small_seq_len(tokens, degrees, getattr(job.loss, "num_chunks", 1))
    set_batch(job, dataclasses.replace(read_batch(job), seq_len=seq_len))
    training.dtype = training.mixed_precision_param = "float32"
    training.enable_cpu_offload = False
    parallelism = job.parallelism
    if parallelism.module_fqns_per_model_part:
        raise RehearsalError("parallelism.module_fqns_per_model_part names layers that the small model lacks")
    parallelism.pipeline_parallel_layers_per_stage = None
    _turn_off(job)
    for node in (job.loss, *(node for _, _, node in configs_below(job.loss))):
        if getattr(node, "global_vocab_size", None):
            node.global_vocab_size = config.vocab_size
    return left_out


def make_plain(job: Any) -> None:
    """Have a job lay out its model of full size on a CPU; see `jobs`."""
    config = job.model_spec.model
    if not transformers_backend.is_job(config):
        _replace_gpu_kernels(config)
    _turn_off(job)


def _turn_off(job: Any) -> None:
    """Turn off what is no part of a step."""
    job.training.disable_cuda_graphs = True
    job.checkpoint.enable = job.validator.enable = False
    job.profiler = type(job.profiler)()
    job.metrics = type(job.metrics)(log_freq=1)


def _check_is_small(config: Any, error: ShrinkError) -> None:
    """Check that a model whose config cannot be made small is small as it is.

    Raises:
        ShrinkError: it is not.
    """
    import torch

    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in config.build().parameters())
    if parameters > _MOST_PARAMETERS:
        raise ShrinkError(
            f"{str(error).removesuffix('.')}; rehearse a flavor of at most {_MOST_PARAMETERS:,} parameters, "
            f"which is taken as it is: this one has {parameters:,}"
        ) from error


def _replace_gpu_kernels(config: Any) -> list[str]:
    """Put configs that a CPU can build in place of those that take a GPU; say which were there.

    Source: ``components/quantization`` and ``models/common/token_dispatcher.py`` of torchtitan 0.3.0.
    """
    from torchtitan.config import Configurable

    replaced = set()
    for _, node, parent, attribute in list(config.traverse(Configurable.Config, recurse=True)):
        replacement = _without_gpu(node)
        if replacement is None:
            continue
        is_linear = type(node).__module__.startswith(_LOW_PRECISION)
        replaced.add(f"{_name(node)} in fp32" if is_linear else f"{_name(replacement)} for {_name(node)}")
        if isinstance(parent, list):
            parent[attribute] = replacement
        else:
            setattr(parent, attribute, replacement)
    return sorted(replaced)


def _without_gpu(node: Any) -> Any:
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    if type(node).__module__.startswith(_LOW_PRECISION):
        # Each extends the config that its converter replaced.
        original = next(cls for cls in type(node).__mro__ if not cls.__module__.startswith(_LOW_PRECISION))
        fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(original) if f.init}
        return original(**fields)
    if _name(node) in _DISPATCHES_ON_A_GPU:
        return AllToAllTokenDispatcher.Config(num_experts=node.num_experts, top_k=node.top_k)
    return None


def _name(node: Any) -> str:
    return type(node).__qualname__.rsplit(".", 2)[-2]


def follow_shapes() -> None:
    """Let what depends on what is in a tensor go by its shape; see `jobs`."""
    from torchtitan.models.common.moe import GroupedExperts
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

    from torchtitan_tp_validate.rehearsal import stand_ins
    from torchtitan_tp_validate.rehearsal.traffic import sharing

    stand_ins.follow_shapes()
    for experts in (GroupedExperts, GptOssGroupedExperts):
        experts.forward = experts.forward.__wrapped__  # in its own precision
    GroupedExperts._grouped_mm = lambda self, *, A, B_t, offs: A @ B_t[0]
    dispatch = AllToAllTokenDispatcher.dispatch

    def dispatch_evenly(self: Any, x: Any, scores: Any, *how: Any) -> Any:
        with sharing(scores.numel()):
            return dispatch(self, x, scores, *how)

    AllToAllTokenDispatcher.dispatch = dispatch_evenly


def vocab_size(job: Any) -> int:
    """Return how many token ids there are."""
    size: int = job.model_spec.model.vocab_size
    return size


def more_inputs(job: Any) -> tuple[tuple[str, Any], ...]:
    """Return what a model is fed beside tokens and positions: with images, ids that no token has."""
    if getattr(job.model_spec.model, "vision_encoder", None) is None:
        return ()
    return (("special_tokens", {"image_id": -1, "video_id": -2}),)


def build_on_meta(job: Any) -> Any:
    """Return the job's model, without memory."""
    import torch

    with torch.device("meta"):
        return copy.deepcopy(job.model_spec.model).build()


def build_trainer(
    job: Any,
    feed: Callable[..., Any],
    local_batch_size: int,
    microbatch_size: int,
    *,
    global_batch_size: int = -1,
) -> Any:
    """Return the job's Trainer; see `jobs`."""
    seq_len = read_batch(job).seq_len
    set_batch(job, Batch(seq_len, local_batch_size, microbatch_size, global_batch_size))
    at_a_time = microbatch_size if pp(job) > 1 else local_batch_size
    job.tokenizer = _Part(lambda **_: None)
    job.dataloader = _Part(lambda *, dp_world_size, dp_rank, **_: feed(dp_rank, dp_world_size, at_a_time))
    build = job.dataloader.build
    job.validator.dataloader = _Part(
        _without_images(build) if is_of_text(job.validator.dataloader) else build
    )
    return job.build()


def _without_images(build: Callable[..., Any]) -> Callable[..., Any]:
    """Return a data loader of text alone: nothing in its batches tells a model where its images are."""

    def build_text(**how: Any) -> Any:
        for inputs, labels in build(**how):
            yield {name: each for name, each in inputs.items() if name != "special_tokens"}, labels

    return build_text


@dataclass
class _Part:
    """In the place of a config whose part of the job is not rehearsed."""

    build: Callable[..., Any]
    infinite: bool = True
    repeat: bool = True  # main's name for it

    def to_dict(self) -> dict[str, Any]:
        """Return what the job's config logs of it."""
        return {}
