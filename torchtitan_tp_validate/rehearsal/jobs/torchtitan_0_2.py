"""The jobs of torchtitan 0.2.x, made small, and its Trainer on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.errors import RehearsalError
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
from torchtitan_tp_validate.rehearsal.jobs.batch import read_batch
from torchtitan_tp_validate.rehearsal.shrink import shrink
from torchtitan_tp_validate.releases.runs import updated_args

# Source: components/quantization of torchtitan 0.2.2.
_LOW_PRECISION = (
    "quantize.linear.float8",
    "quantize.grouped_mm.float8",
    "quantize.linear.mx",
    "quantize.grouped_mm.mx",
)
_until_exit = ExitStack()


def prepare(compile: bool) -> set[str]:
    """Make the CPU torchtitan's device; see `jobs`."""
    choose_cpu(compile)
    from torch.distributed.tensor.experimental import implicit_replication
    from torchtitan.models.attention import FlexAttentionWrapper

    from torchtitan_tp_validate.rehearsal.models import torchtitan_0_2
    from torchtitan_tp_validate.rehearsal.noted import note

    torchtitan_0_2.stand_in_for_gpu_kernels()
    # In fp32 attention has the math kernel only, which adds a plain causal mask to qwen3's DTensors.
    _until_exit.enter_context(implicit_replication())
    used: set[str] = set()
    _count_no_tokens_of_shapes(used)
    FlexAttentionWrapper.forward = note(FlexAttentionWrapper.forward, "flex attention", used)
    return used


def _count_no_tokens_of_shapes(used: set[str]) -> None:
    """Let experts be balanced by the tokens of the batch alone.

    The stages of a pipeline find the shapes that they send by one forward and backward pass of what the
    memory holds, and 0.2.x counts its tokens with those of the first step: biases of experts are then off by
    twice ``load_balance_coeff`` at most, until they are balanced again.
    Source: torch/distributed/pipelining/stage.py, torchtitan models/moe/moe.py (tokens_per_expert).
    """
    import torch
    from torch.distributed.pipelining.stage import PipelineStage

    def uncounted(compute: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compute)
        def compute_uncounted(self: Any, *args: Any, **kwargs: Any) -> Any:
            named = self.submod.named_buffers()
            counts = [(each, each.clone()) for name, each in named if name.endswith("tokens_per_expert")]
            result = compute(self, *args, **kwargs)
            with torch.no_grad():
                for buffer, count in counts:
                    buffer.copy_(count)
            if counts:
                used.add("experts balanced without the pass that finds a pipeline's shapes")
            return result

        return compute_uncounted

    # The backward pass counts where it computes activations again. An older torch has the last alone.
    for name in ("_compute_outputs", "_compute_input_grads", "_shape_inference"):
        if hasattr(PipelineStage, name):
            setattr(PipelineStage, name, uncounted(getattr(PipelineStage, name)))


def parse(request: Request) -> Any:
    """Return the ``JobConfig`` that is asked for; see `jobs`."""
    if request.arguments:
        from torchtitan_tp_validate.job import parse_command_line

        return parse_command_line(request.arguments)
    from torchtitan.config import JobConfig

    job = JobConfig()
    job.model.name, job.model.flavor = request.model, request.flavor
    for field, value in request.degrees:
        setattr(job.parallelism, field, value)
    job.compile.enable = request.compile
    # The batch is not asked about: one for every stage.
    job.training.local_batch_size = 2 * pp(job) * job.parallelism.pipeline_parallel_microbatch_size
    return job


def make_small(job: Any, degrees: Degrees, folder: Path) -> list[str]:
    """Shrink the job's model and sequence; see `jobs`."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torchtitan.protocols.train_spec import get_train_spec

    low_precision = [name for name in job.model.converters if name in _LOW_PRECISION]
    job.model.converters = [name for name in job.model.converters if name not in _LOW_PRECISION]
    spec = get_train_spec(job.model.name)
    for module in list(sys.modules.values()):
        if module.__name__.startswith("torchtitan.models.") and hasattr(module, "create_attention_mask"):
            module.create_attention_mask = partial(create_block_mask, device="cpu")  # type: ignore[attr-defined]
    layers = LAYERS_PER_RANK * pp(job) if pp(job) > 1 else 1
    args = spec.model_args[job.model.flavor]
    if transformers_backend.is_job(args):
        names = job.hf_transformers
        names.model = transformers_backend.make_small(args, names.model, degrees, layers, folder)
    else:
        args = shrink(args, degrees, least_layers=layers)
    left_out = [f"{name} in fp32" for name in low_precision]
    if getattr(getattr(args, "moe_args", None), "use_grouped_mm", False):
        # The kernel rounds to bfloat16, on a CPU too.
        args.moe_args.use_grouped_mm = False
        left_out.append("a loop over the experts")
    if degrees.cp > 1:
        _keep_tokens_in_order(job)
        left_out.append("context parallelism without a load balancer")
    job.optimizer.eps = EPSILON
    left_out.append(OF_THE_OPTIMIZER)
    training = job.training
    training.seq_len = small_seq_len(training.seq_len, degrees)
    training.dtype = training.mixed_precision_param = "float32"
    training.enable_cpu_offload = False
    _turn_off(job, args)
    return left_out


def _keep_tokens_in_order(job: Any) -> None:
    """Shard a row into consecutive parts: attention by the math kernel of a CPU knows no other order.

    Raises:
        RehearsalError: the release has no option for it, as 0.2.0 and 0.2.1.
    """
    if not hasattr(job.parallelism, "context_parallel_load_balancer"):
        raise RehearsalError(
            "context parallelism of this release needs the attention kernels of a GPU: to rehearse the rest, "
            "set context_parallel_degree to 1"
        )
    job.parallelism.context_parallel_load_balancer = None


def make_plain(job: Any) -> None:
    """Have a job lay out its model of full size on a CPU; see `jobs`."""
    from torchtitan.protocols.train_spec import get_train_spec

    job.model.converters = [name for name in job.model.converters if name not in _LOW_PRECISION]
    _turn_off(job, get_train_spec(job.model.name).model_args[job.model.flavor])


def _turn_off(job: Any, args: Any) -> None:
    """Turn off what is no part of a step, and register the job's model with these args."""
    from torchtitan.protocols.train_spec import get_train_spec, register_train_spec

    from torchtitan_tp_validate.rehearsal.batches import END_OF_DOCUMENT

    job.checkpoint.enable = job.validation.enable = False
    job.profiling = type(job.profiling)()
    job.metrics = type(job.metrics)(log_freq=1)
    register_train_spec(
        job.model.name,
        dataclasses.replace(
            get_train_spec(job.model.name),
            model_args={job.model.flavor: args},
            build_tokenizer_fn=lambda *_, **__: SimpleNamespace(eos_id=END_OF_DOCUMENT),
            state_dict_adapter=None,
        ),
    )


def follow_shapes() -> None:
    """Let what depends on what is in a tensor go by its shape; see `jobs`."""
    import torch
    from torchtitan.distributed import pipeline_parallel
    from torchtitan.distributed.expert_parallel import ExpertParallel
    from torchtitan.models.moe import moe, utils

    from torchtitan_tp_validate.rehearsal.traffic import sharing

    dispatch, run_each = ExpertParallel._token_dispatch, moe._run_experts_for_loop

    def dispatch_evenly(self: Any, module: Any, inputs: Any, mesh: Any) -> Any:
        with sharing(len(inputs[0])):
            return dispatch(self, module, inputs, mesh)

    def run_evenly(w1: Any, w2: Any, w3: Any, x: Any, counts: Any) -> Any:
        with sharing(len(x)):
            return run_each(w1, w2, w3, x, counts)

    def in_any_order(counts: Any, experts: int, ranks: int, length: int, *_: Any) -> Any:
        sizes = counts.view(ranks, experts).sum(0).to(torch.int32)
        return torch.zeros(length, dtype=torch.int32), sizes, sizes.cumsum(0, dtype=torch.int32)

    def overlap(*_: Any) -> None:
        raise RehearsalError(
            "DualPipeV computes on two streams of a GPU at a time: to have it counted, set "
            "parallelism.pipeline_parallel_expert_parallel_overlap to false"
        )

    pipeline_parallel.overlap_callback = overlap
    ExpertParallel._token_dispatch = dispatch_evenly
    moe._run_experts_for_loop = run_evenly
    utils.generate_permute_indices = in_any_order


def vocab_size(job: Any) -> int:
    """Return how many token ids there are."""
    from torchtitan.protocols.train_spec import get_train_spec

    size: int = get_train_spec(job.model.name).model_args[job.model.flavor].vocab_size
    return size


def more_inputs(job: Any) -> tuple[tuple[str, Any], ...]:
    """Return what a model is fed beside tokens: nothing, not even their positions."""
    del job
    return ()


def build_on_meta(job: Any) -> Any:
    """Return the job's model, without memory."""
    import torch
    from torchtitan.protocols.train_spec import get_train_spec

    spec = get_train_spec(job.model.name)
    with torch.device("meta"):
        return spec.model_cls(updated_args(spec.model_args[job.model.flavor], job))


def _microbatches(job: Any) -> int:
    """Return how many parts a validation batch is cut into."""
    return max(1, read_batch(job).microbatches) if pp(job) > 1 else 1


def build_trainer(
    job: Any,
    feed: Callable[..., Any],
    local_batch_size: int,
    microbatch_size: int,
    *,
    global_batch_size: int = -1,
) -> Any:
    """Return the job's Trainer; see `jobs`."""
    from torchtitan.components import validate
    from torchtitan.protocols import train_spec
    from torchtitan.train import Trainer

    training = job.training
    # One too few, where the job's own validation batch does not fill the microbatches of its pipeline.
    validated = local_batch_size - (job.validation.local_batch_size % _microbatches(job) != 0)
    training.local_batch_size, training.global_batch_size = local_batch_size, global_batch_size
    job.parallelism.pipeline_parallel_microbatch_size = microbatch_size

    def batches(*, dp_world_size: int, dp_rank: int, rows: int = local_batch_size, **_: Any) -> Any:
        for inputs, labels in feed(dp_rank, dp_world_size, local_batch_size):
            yield {"input": inputs["input"][:rows]}, labels[:rows]

    train_spec.get_train_spec(job.model.name).build_dataloader_fn = batches
    # 0.2.0 calls it after Hugging Face.
    old = hasattr(validate, "build_hf_validation_dataloader")
    setattr(
        validate, f"build_{'hf' if old else 'text'}_validation_dataloader", partial(batches, rows=validated)
    )
    return Trainer(job)
