"""The shardings of a torchtitan 0.3.x config tree, declared by torchtitan itself for a run.

torchtitan declares them in ``update_from_config``, just before it builds the model, after checks of its own.

Source: ``models/common/decoder.py`` of torchtitan 0.3.0.
"""

from __future__ import annotations

import copy
import inspect
import math
from types import SimpleNamespace
from typing import Any

from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG, TOKEN_FIELDS, Axis, Degrees
from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.releases.config_tree import declares_shardings, nodes

REFUSED = "torchtitan itself refuses this run when it builds the model: {}"


def objection(config: Any, run: Any, degrees: Degrees) -> Exception | None:
    """Return what torchtitan raises where it does not take a model's config with its run, or None.

    It does so in ``update_from_config``, when its process groups are up: a sequence longer than RoPE, a
    dispatcher without room for a rank's tokens. Heads that do not divide are among its reasons, so ask
    after the verdict.
    """
    try:
        _declared(config, run, degrees)
    except Exception as error:
        return error
    return None


def declares_later(config: Any) -> bool:
    """Return whether a tree has its shardings still to come, in ``update_from_config``."""
    return hasattr(config, "update_from_config") and not declares_shardings(config)


def shares_kv_heads(run: Any) -> bool:
    """Return whether torchtitan itself lets ranks share KV heads in a run; ``patches/`` has that option.

    ``update_from_config`` then tells of as many KV heads as ranks, whatever the tree had before.
    """
    return bool(getattr(getattr(run, "parallelism", None), "replicate_kv_heads", False))


def as_built(config: Any, run: Any, degrees: Degrees) -> Any:
    """Return the config with the KV heads that a model is built with; None where torchtitan objects."""
    if not shares_kv_heads(run):
        return config
    try:
        return _declared(config, run, degrees)
    except Exception:
        return None


def with_shardings(config: Any, degrees: Degrees, run: Any) -> Any:
    """Return a copy of a tree with its shardings declared, which went through torchtitan's own hands.

    Where one of torchtitan's checks stops the job (`objection` says which), or where there is
    no job, it is told of a run that passes them all and declares the same: the verdict is on every layer, and
    on more than they look at.

    Args:
        config: a tree that declares them later; it stays as it is.
        degrees: those to declare them for.
        run: ``Trainer.Config``, or None.

    Raises:
        PlanError: torchtitan does not get so far.
    """
    problem = ""
    if run is not None and not shares_kv_heads(run):
        try:
            return _declared(config, run, degrees)
        except Exception as error:
            problem = REFUSED.format(error)
    try:
        run = _any_run(degrees) if run is None else run
        return _declared(config, run, _Undemanding(config, degrees))
    except Exception as error:
        problem = problem or f"{type(config).__qualname__} does not declare its shardings: {error}"
        raise PlanError(problem) from error


def _declared(config: Any, run: Any, degrees: Degrees | _Undemanding) -> Any:
    """Return a copy of the tree that a copy of the run, at these degrees, has declared."""
    updated, run = copy.deepcopy((config, run))
    for axis in (Axis.TP, Axis.EP):
        setattr(run.parallelism, axis.flag, degrees.of(axis))
    if isinstance(degrees, _Undemanding):
        degrees.relax(run)
    # A converted config judges the run itself, by way of this function.
    update = getattr(updated, "update_unjudged", updated.update_from_config)
    # Its name was ``trainer_config`` for some months of main.
    (parameter, *_) = inspect.signature(update).parameters
    update(**{parameter: run})
    for node in nodes(updated):
        # A token dispatcher without a device looks for a GPU as it is built, for buffers that nobody reads.
        if hasattr(node, "num_max_tokens_per_rank") and hasattr(node, "device"):
            node.device = "meta"
    return updated


class _Undemanding:
    """A run that no check of torchtitan's objects to, and that declares what it would at ``degrees``."""

    def __init__(self, config: Any, degrees: Degrees) -> None:
        counts = (getattr(node, "num_experts", 0) for node in nodes(config))
        experts = math.gcd(*(count for count in counts if isinstance(count, int)))
        self._ep = experts if degrees.ep > 1 and experts > 1 else degrees.ep

    def of(self, axis: Axis) -> int:
        """Return the degree of one axis; of expert parallelism, whether there is any is what counts."""
        return self._ep if axis is Axis.EP else 1

    def relax(self, run: Any) -> None:
        """Ask for little of everything else: tokens, parallelism, memory."""
        for flag in (FLAGS["cp"], PIPELINE_FLAG):
            setattr(run.parallelism, flag, 1)
        for field in ("local_batch_size", *TOKEN_FIELDS):
            if hasattr(getattr(run, "training", None), field):
                setattr(run.training, field, 1)
        # MinimalAsyncEP wants everything recomputed.
        run.compile = SimpleNamespace(memory_policy="full")


def _any_run(degrees: Degrees) -> Any:
    """Return a run for a config that has none."""
    from torchtitan import config

    parallelism = config.ParallelismConfig()
    # main had no choice of backends before June 2026.
    if hasattr(parallelism, "spmd_backend"):
        parallelism.spmd_backend = degrees.spmd_backend
    # It was asked for before June 2026, too.
    debug = config.DebugConfig() if hasattr(config, "DebugConfig") else None
    return SimpleNamespace(
        parallelism=parallelism, training=config.TrainingConfig(), activation_checkpoint=None, debug=debug
    )
