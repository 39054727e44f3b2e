"""The jobs of a torchtitan line, made small, and its Trainer on the CPU.

One file per line (`torchtitan_0_2`, `torchtitan_0_3`, `torchtitan_main`), each with the same names:

- ``prepare(compile)``: makes the CPU torchtitan's device, and puts the stand-ins in place for the GPU kernels
  that its models call. To be called once per process, before anything of torchtitan is imported. Returns
  the names of the stand-ins that are used from then on.
- ``parse(request)``: the job that a `Request` asks for.
- ``make_small(job, degrees, folder)``: shrinks the job's model and sequence in place, in files of the folder
  where it is made of files, and turns off what a rehearsal has no need of: checkpoints, profiles, validation,
  low precision. Returns what it left out, in words.
- ``make_plain(job)``: turns off the same, and keeps the model and the sequence as they are: it can be laid
  out on a CPU, and no more.
- ``follow_shapes()``: lets what depends on what is in a tensor go by its shape, experts with equal shares.
- ``build_on_meta(job)``: the job's model, without memory.
- ``build_trainer(job, feed, local_batch_size, microbatch_size, *, global_batch_size)``: the job's Trainer,
  fed by ``feed(dp_rank, dp_world_size, local_batch_size)`` in place of its data set.
- ``vocab_size(job)``, ``more_inputs(job)``: what the job says.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG, Degrees
from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal.world import World
from torchtitan_tp_validate.releases import nearest_line

LAYERS_PER_RANK = 4
"""Of a pipeline: enough for two stages on each rank, whatever the first and the last are spared."""

EPSILON = 1.0
"""Of Adam. With its own it makes as much of a tiny gradient as of a large one, and of its rounding."""

OF_THE_OPTIMIZER = "an epsilon of 1 for Adam"

_LEAST_SEQ_LEN = 32
_CP_BLOCK = 128
"""Flex attention shards its masks over CP by whole blocks of so many tokens."""


@dataclass(frozen=True)
class Request:
    """The job to rehearse.

    Attributes:
        arguments: torchtitan's own command line, or empty: ``model`` and ``flavor`` name the model then.
        degrees: field of the parallelism config -> degree, with ``model`` only.
        replicate_kv_heads: with KV-head replication.
        compile: what the job compiles.
        repair: with the repairs of the known faults that its model has.
    """

    arguments: tuple[str, ...] = ()
    model: str = ""
    flavor: str = ""
    degrees: tuple[tuple[str, int | str], ...] = ()
    replicate_kv_heads: bool = False
    compile: bool = False
    repair: bool = False


def installed_line() -> ModuleType:
    """Return the module for the torchtitan that is installed."""
    line = nearest_line()
    if line is None:
        raise RehearsalError("torchtitan is not installed")
    return importlib.import_module(f"{__name__}.{line.__name__.rpartition('.')[2]}")


def plain_job(job: Any) -> Any:
    """Return a job without the checks of its own class: kimi's refuses TP and PP, for its optimizer."""
    base = next((c for c in type(job).__mro__ if c.__qualname__ == "Trainer.Config"), type(job))
    return (
        job if base is type(job) else base(**{f.name: getattr(job, f.name) for f in dataclasses.fields(base)})
    )


def split(job: Any, world: World | None) -> None:
    """Set the job's degrees, or those of one process where ``world`` is None."""
    parallelism = job.parallelism
    for ours, theirs in FLAGS.items():
        if hasattr(parallelism, theirs):
            setattr(parallelism, theirs, getattr(world.degrees, ours) if world else 1)
    setattr(parallelism, PIPELINE_FLAG, world.pp if world else 1)


def pp(job: Any) -> int:
    """Return the job's pipeline parallel degree."""
    degree: int = getattr(job.parallelism, PIPELINE_FLAG)
    return degree


def checkpoint_of(job: Any) -> Any:
    """Return a copy of how the job saves checkpoints, or None where it saves none."""
    checkpoint = copy.deepcopy(job.checkpoint)
    return checkpoint if checkpoint.enable and not getattr(checkpoint, "load_only", False) else None


def save_every(steps: int, checkpoint: Any, folder: Path) -> Any:
    """Return how a rehearsal saves what the job saves: into its own folder, starting from nothing else."""
    checkpoint = copy.deepcopy(checkpoint)
    ours = {
        "folder": str(folder),
        "interval": steps,
        "load_step": -1,
        "initial_load_path": None,
        "initial_load_in_hf": False,
        "initial_load_in_hf_quantized": False,
        "last_save_in_hf": False,
        "async_mode": "disabled",
        "keep_latest_k": 0,
        "create_seed_checkpoint": False,
    }
    for name, value in ours.items():
        if hasattr(checkpoint, name):
            setattr(checkpoint, name, value)
    return checkpoint


def validation_of(job: Any) -> Any:
    """Return the part of a job that says how it validates."""
    return job.validator if hasattr(job, "validator") else job.validation


def ignored_label() -> int | None:
    """Return the label that torchtitan's loss passes over, or None: 0.2.0 and 0.2.1 take means of all."""
    from torchtitan.components import loss

    return getattr(loss, "IGNORE_INDEX", None)


def small_seq_len(seq_len: int, degrees: Degrees, chunks: int = 1) -> int:
    """Return a small number of tokens that sequence and context parallelism cut as they cut ``seq_len``.

    Args:
        seq_len: of the job.
        degrees: of the rehearsal.
        chunks: how many parts the loss takes it in.
    """
    cut = math.lcm(degrees.tp * (2 * degrees.cp if degrees.cp > 1 else 1), chunks)
    least = 2 * _CP_BLOCK * degrees.cp if degrees.cp > 1 else _LEAST_SEQ_LEN
    return min(seq_len, least + (seq_len - least) % cut)
