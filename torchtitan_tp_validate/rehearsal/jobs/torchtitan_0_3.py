"""The jobs of torchtitan 0.3.x, made small, and its Trainer on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG, Degrees
from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal.cpu import choose_cpu
from torchtitan_tp_validate.rehearsal.jobs import LAYERS_PER_RANK, Request, small_seq_len
from torchtitan_tp_validate.rehearsal.shrink import configs_below, shrink
from torchtitan_tp_validate.rehearsal.world import World

_ONLY_ON_A_GPU = ("DeepEPTokenDispatcher", "HybridEPTokenDispatcher", "MinimalAsyncEPTokenDispatcher")
_LOW_PRECISION = "torchtitan.components.quantization."


def prepare() -> set[str]:
    """Make the CPU torchtitan's device; see `jobs`."""
    choose_cpu()
    from torchtitan_tp_validate.rehearsal.models import torchtitan_0_3
    from torchtitan_tp_validate.rehearsal.stand_ins import attend_by_mask, run_each_document

    torchtitan_0_3.prepare("cpu")
    used: set[str] = set()
    attend_by_mask(used)
    run_each_document(used)
    return used


def parse(request: Request) -> Any:
    """Return the ``Trainer.Config`` that is asked for; see `jobs`."""
    if request.arguments:
        from torchtitan_tp_validate.job import parse_command_line

        return parse_command_line(request.arguments)
    from torchtitan.config import ParallelismConfig

    from torchtitan_tp_validate import registry

    found = registry.model(request.model).spec(request.flavor)
    jobs = [build() for build in registry.configs(request.model).values()]
    # Of the flavor's own job if there is one: its loss and optimizer go with the model.
    job = next((job for job in jobs if job.model_spec.flavor == request.flavor), jobs[0])
    job.model_spec = dataclasses.replace(job.model_spec, flavor=request.flavor, model=found.config)
    job.parallelism = ParallelismConfig()
    for field, value in request.degrees:
        setattr(job.parallelism, field, value)
    return job


def make_small(job: Any, degrees: Degrees) -> None:
    """Shrink the job's model and sequence; see `jobs`."""
    stages = LAYERS_PER_RANK * pp(job) if pp(job) > 1 else 1
    config = shrink(job.model_spec.model, degrees, least_layers=stages)
    job.model_spec = dataclasses.replace(job.model_spec, model=config)
    training = job.training
    # Losses that go chunk by chunk cut it too.
    training.seq_len = small_seq_len(training.seq_len, degrees, getattr(job.loss, "num_chunks", 1))
    training.dtype = training.mixed_precision_param = "float32"
    training.enable_cpu_offload = False
    training.disable_cuda_graphs = True
    parallelism = job.parallelism
    if parallelism.module_fqns_per_model_part:
        raise RehearsalError("parallelism.module_fqns_per_model_part names layers that the small model lacks")
    parallelism.pipeline_parallel_layers_per_stage = None
    job.compile.enable = job.checkpoint.enable = job.validator.enable = False
    job.profiler = type(job.profiler)()
    job.metrics = type(job.metrics)(log_freq=1)
    for node in (job.loss, *(node for _, _, node in configs_below(job.loss))):
        if getattr(node, "global_vocab_size", None):
            node.global_vocab_size = config.vocab_size
    for path, _, node in configs_below(config):
        name = type(node).__qualname__.partition(".")[0]
        if name in _ONLY_ON_A_GPU or type(node).__module__.startswith(_LOW_PRECISION):
            raise RehearsalError(f"{path} is a {name}, which takes a GPU")


def split(job: Any, world: World | None) -> None:
    """Set the job's degrees; see `jobs`."""
    parallelism = job.parallelism
    for ours, theirs in FLAGS.items():
        if hasattr(parallelism, theirs):
            setattr(parallelism, theirs, getattr(world.degrees, ours) if world else 1)
    setattr(parallelism, PIPELINE_FLAG, world.pp if world else 1)


def pp(job: Any) -> int:
    """Return the job's pipeline parallel degree."""
    degree: int = getattr(job.parallelism, PIPELINE_FLAG)
    return degree


def vocab_size(job: Any) -> int:
    """Return how many token ids there are."""
    size: int = job.model_spec.model.vocab_size
    return size


def more_inputs(job: Any) -> tuple[tuple[str, Any], ...]:
    """Return what a model is fed beside tokens and positions: with images, ids that no token has."""
    if getattr(job.model_spec.model, "vision_encoder", None) is None:
        return ()
    return (("special_tokens", {"image_id": -1, "video_id": -2}),)


def build_trainer(job: Any, feed: Callable[..., Any], local_batch_size: int) -> Any:
    """Return the job's Trainer; see `jobs`."""
    job.training.local_batch_size, job.training.global_batch_size = local_batch_size, -1
    job.tokenizer = _Part(lambda **_: None)
    job.dataloader = _Part(
        lambda *, dp_world_size, dp_rank, local_batch_size, **_: feed(
            dp_rank, dp_world_size, local_batch_size
        )
    )
    return job.build()


class _Part:
    """In the place of a config whose part of the job is not rehearsed."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self.build = build

    def to_dict(self) -> dict[str, Any]:
        """Return what the job's config logs of it."""
        return {}
