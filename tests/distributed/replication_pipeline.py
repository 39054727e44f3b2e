"""A pipeline of two stages in torchtitan 0.3.x, each of them tensor parallel with shared key-value heads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.distributed.lines import TinyModel

STAGES = 2


@dataclass
class Pipeline:
    """This rank's stage, and what runs all of them.

    Attributes:
        stage: its module, split over the TP axis.
        context: what torchtitan's Trainer has open around each step.
    """

    stage: nn.Module
    context: Callable[[], AbstractContextManager[None]]
    parallel_dims: Any
    _schedule: Any
    _first: bool
    _last: bool

    def step(self, tokens: torch.Tensor, labels: torch.Tensor) -> float:
        """Forward and backward of a batch, a row to a microbatch; the loss, on every rank."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        losses: list[torch.Tensor] | None = [] if self._last else None
        with self.context():
            self._schedule.step(
                arg_mbs=[(row[None],) for row in tokens] if self._first else None,
                kwarg_mbs=[{"positions": positions}] * len(tokens),
                target_mbs=[row[None] for row in labels] if self._last else None,
                losses=losses,
                loss_kwargs={"global_valid_tokens": labels.numel()},
                return_outputs=False,
            )
        total = torch.stack(losses).sum().detach() if losses else torch.zeros(())
        dist.all_reduce(total)
        # Every rank of the last stage, and no other, has it.
        loss: float = total.item() * STAGES / dist.get_world_size()
        return loss


def build_pipeline(tiny: TinyModel, tp: int, device: torch.device) -> Pipeline:
    """Cut a model in two stages by torchtitan's own hand; the ranks besides TP are its stages."""
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.distributed.pipeline_parallel import pipeline_llm
    from torchtitan.distributed.utils import get_spmd_context

    parallel_dims = tiny.make_parallel_dims(tp, dist.get_world_size())
    parallel_dims = replace(parallel_dims, pp=STAGES, dp_shard=parallel_dims.dp_shard // STAGES)
    _, arguments = tiny.arguments(parallel_dims)
    arguments["parallelism"] = replace(arguments["parallelism"], pipeline_parallel_degree=STAGES)
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
    context = get_spmd_context(parallel_dims=parallel_dims)
    return Pipeline(stage, context, parallel_dims, schedule, first, last)
