"""A pipeline of two stages, cut by torchtitan's own function, each of them tensor parallel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torchtitan_tp_validate.degrees import TOKEN_BUDGET
from torchtitan_tp_validate.layout import MICROBATCHES_FIELD
from torchtitan_tp_validate.rehearsal.models import TinyModel
from torchtitan_tp_validate.rehearsal.training import Context, whole

STAGES = 2


@dataclass
class Pipeline:
    """This rank's stage, and what runs all of them.

    Attributes:
        stage: its module, split over the TP axis.
        context: what torchtitan's Trainer has open around each step.
        feed: runs the schedule on tokens and labels, a row to a microbatch, and appends the loss of each
            to the list, which only ranks of the last stage are given.
        last: whether this is one.
    """

    stage: nn.Module
    context: Context
    parallel_dims: Any
    feed: Callable[[torch.Tensor, torch.Tensor, list[torch.Tensor] | None], None]
    last: bool

    def step(self, tokens: torch.Tensor, labels: torch.Tensor) -> float:
        """Run a batch forward and backward, and return its loss, on every rank."""
        losses: list[torch.Tensor] | None = [] if self.last else None
        with self.context():
            self.feed(tokens, labels, losses)
        total = whole(torch.stack(losses).sum()) if losses else torch.zeros(())
        dist.all_reduce(total)
        # Every rank of the last stage, and no other, has it.
        loss: float = total.item() * STAGES / dist.get_world_size()
        return loss


def build_pipeline(tiny: TinyModel, parallel_dims: Any, device: torch.device) -> Pipeline:
    """Cut a model in two stages, with torchtitan's own ``pipeline_llm``."""
    args, kwargs = tiny.arguments(parallel_dims)
    if args:
        return _pipeline_0_2(tiny, parallel_dims, args[1], device)
    return _pipeline_0_3(tiny, parallel_dims, kwargs, device)


def _pipeline_0_2(tiny: TinyModel, parallel_dims: Any, job: Any, device: torch.device) -> Pipeline:
    from torchtitan.distributed.pipeline_parallel import pipeline_llm

    job.parallelism.pipeline_parallel_degree = STAGES
    job.training.local_batch_size = STAGES

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / (STAGES * tiny.seq_len)

    schedule, (stage,), first, last = pipeline_llm(
        tiny.model, parallel_dims, job, device, tiny.model.model_args, tiny.parallelize_fn, loss_fn
    )

    def feed(tokens: torch.Tensor, labels: torch.Tensor, losses: list[torch.Tensor] | None) -> None:
        inputs = (tokens,) if first else ()
        schedule.step(*inputs, target=labels if last else None, losses=losses, return_outputs=False)

    return Pipeline(stage, nullcontext, parallel_dims, feed, last)


def _pipeline_0_3(
    tiny: TinyModel, parallel_dims: Any, arguments: dict[str, Any], device: torch.device
) -> Pipeline:
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.distributed.pipeline_parallel import pipeline_llm
    from torchtitan.distributed.utils import get_spmd_context

    # Main is told how many microbatches there are, and takes each without a batch dimension.
    in_a_row = hasattr(arguments["training"], TOKEN_BUDGET)
    counts = {MICROBATCHES_FIELD: STAGES} if in_a_row else {}
    arguments["parallelism"] = replace(arguments["parallelism"], pipeline_parallel_degree=STAGES, **counts)
    if not in_a_row:
        arguments["training"] = replace(arguments["training"], local_batch_size=STAGES)

    def loss_fn(
        logits: torch.Tensor, labels: torch.Tensor, global_valid_tokens: int, **_: Any
    ) -> tuple[torch.Tensor, None]:
        total = cross_entropy_loss(logits, labels, global_vocab_size=tiny.vocab_size)
        return total / global_valid_tokens, None

    schedule, (stage,), first, last = pipeline_llm(
        tiny.model,
        **arguments,
        device=device,
        model_config=tiny.model.config,
        parallelize_fn=tiny.parallelize_fn,
        loss_fn=loss_fn,
    )

    def of_one(row: torch.Tensor) -> torch.Tensor:
        return row if in_a_row else row[None]

    def feed(tokens: torch.Tensor, labels: torch.Tensor, losses: list[torch.Tensor] | None) -> None:
        positions = of_one(torch.arange(tokens.shape[1], device=tokens.device))
        schedule.step(
            arg_mbs=[(of_one(row),) for row in tokens] if first else None,
            kwarg_mbs=[{"positions": positions}] * len(tokens),
            target_mbs=list(map(of_one, labels)) if last else None,
            losses=losses,
            loss_kwargs={"global_valid_tokens": labels.numel()},
            return_outputs=False,
        )

    return Pipeline(stage, get_spmd_context(parallel_dims=parallel_dims), parallel_dims, feed, last)
