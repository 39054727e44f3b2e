"""torchtitan's main since 0.3.0: config trees as in 0.3.x, and a budget of tokens in the place of batches.

It has no batch dimension: a microbatch is so many tokens in a row, which sequence and context parallelism
split, and a pipeline is told how many microbatches there are. ``full_dtensor`` is gone, and context
parallelism is for ``spmd_types``. What a model splits is declared as in 0.3.x, and is read there.

Source: ``config/configs.py``, ``trainer.py``, ``distributed/context_parallel/api.py`` of torchtitan at
b5bcd76c6 (2026-08-21).
"""

from __future__ import annotations

from typing import Any

from torchtitan_tp_validate.degrees import TOKEN_BUDGET
from torchtitan_tp_validate.releases import contracts, runs
from torchtitan_tp_validate.releases.rows import SPMD_BACKENDS as _OF_0_3
from torchtitan_tp_validate.releases.torchtitan_0_3 import (
    CONFIG_REGISTRY,
    FAULT_SOURCES,
    KV_REPLICATION,
    TRAINER_MODULE,
    find_config,
    flavors,
    in_run,
    named_model,
    read,
    read_run,
    requested_model,
)

__all__ = [
    "CONFIG_REGISTRY",
    "CONTRACT",
    "FAULT_SOURCES",
    "KV_REPLICATION",
    "SPMD_BACKENDS",
    "TRAINER_MODULE",
    "find_config",
    "flavors",
    "in_run",
    "is_job",
    "named_model",
    "read",
    "read_run",
    "requested_model",
]

SPMD_BACKENDS = tuple(backend for backend in _OF_0_3 if backend.name != "full_dtensor")
CONTRACT = contracts.of_config_trees(
    runs.SIZES[1],
    gated_delta="models/qwen3_5/gdn.py",
    absent=("pipeline_parallel_microbatch_size",),
    checkpoints="components/checkpointer/base.py:BaseCheckpointManager.Config",
)


def is_job(job: Any) -> bool:
    """Return whether this is main's ``Trainer.Config``."""
    return hasattr(job, "model_spec") and hasattr(getattr(job, "training", None), TOKEN_BUDGET)
