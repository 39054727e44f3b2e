"""The batch of a job in sequences of one length, whatever its line of torchtitan counts it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchtitan_tp_validate.degrees import PIPELINE_FLAG, TOKEN_BUDGET


@dataclass(frozen=True)
class Batch:
    """A batch in sequences.

    Attributes:
        seq_len: tokens in each.
        local: that a data rank computes in a step, without accumulating gradients.
        microbatch: that it computes at a time in a pipeline.
        total: of all data ranks in a step, or -1: what the ranks make of it.
    """

    seq_len: int
    local: int
    microbatch: int = 1
    total: int = -1

    @property
    def microbatches(self) -> int:
        """Into how many parts a pipeline cuts the local batch."""
        return self.local // self.microbatch


def read_batch(job: Any) -> Batch:
    """Return the batch of a job.

    A budget of tokens holds as many sequences of the greatest length as fit into it, and one at least.
    """
    training, parallelism = job.training, job.parallelism
    if not hasattr(training, TOKEN_BUDGET):
        size = parallelism.pipeline_parallel_microbatch_size
        return Batch(training.seq_len, training.local_batch_size, size, training.global_batch_size)
    seq_len = training.max_context_length
    size = max(getattr(training, TOKEN_BUDGET) // seq_len, 1)
    local = size * (parallelism.num_pp_microbatches if _pp(job) > 1 else 1)
    tokens = training.num_tokens_per_train_step
    return Batch(seq_len, local, size, tokens // seq_len if tokens > 0 else -1)


def set_batch(job: Any, batch: Batch) -> None:
    """Set the batch of a job."""
    training, parallelism = job.training, job.parallelism
    if not hasattr(training, TOKEN_BUDGET):
        training.seq_len = batch.seq_len
        training.local_batch_size, training.global_batch_size = batch.local, batch.total
        parallelism.pipeline_parallel_microbatch_size = batch.microbatch
        return
    in_pipeline = _pp(job) > 1
    training.max_context_length = batch.seq_len
    setattr(training, TOKEN_BUDGET, batch.seq_len * (batch.microbatch if in_pipeline else batch.local))
    parallelism.num_pp_microbatches = batch.microbatches if in_pipeline else 1
    training.num_tokens_per_train_step = batch.total * batch.seq_len if batch.total > 0 else batch.total


def _pp(job: Any) -> int:
    degree: int = getattr(job.parallelism, PIPELINE_FLAG)
    return degree
