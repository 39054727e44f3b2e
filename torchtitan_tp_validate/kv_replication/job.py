"""Ask for KV-head replication in a whole run: the job that torchtitan parsed, and what it parallelizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchtitan_tp_validate.degrees import degrees_of_job
from torchtitan_tp_validate.kv_replication.support import (
    HOW_TO_CONVERT,
    raise_if_foreign,
    raise_if_untried,
    unsupported_error,
)


def ask_job(config: Any) -> None:
    """Put replication into a job before anything is built, or refuse it.

    Args:
        config: ``Trainer.Config`` (0.3.x), whose model config is converted, or ``JobConfig`` (0.2.x), whose
            model is changed when it is parallelized.

    Raises:
        KVReplicationError: the job asks for something that replication is not supported with.
    """
    if not hasattr(config, "model_spec"):
        from torchtitan_tp_validate.kv_replication.torchtitan_0_2 import raise_if_unsupported

        raise_if_unsupported(config)
    elif config.model_spec is not None:
        from torchtitan_tp_validate.kv_replication.torchtitan_0_3 import ReplicateKVHeads

        raise_if_untried(config.parallelism, config.compile)
        config.model_spec.model = ReplicateKVHeads.Config().build().convert(config.model_spec.model)


def accept_job(config: Any) -> None:
    """Spare a job that was judged the verdict that its model config gives by itself, at the same degrees.

    Args:
        config: what `ask_job` was given.
    """
    if hasattr(config, "model_spec"):
        config.model_spec.model.accept(degrees_of_job(config))


def ask_call(function: Callable[..., Any], arguments: Mapping[str, Any], tp: int) -> None:
    """Put replication into the model of a parallelize call, or refuse it.

    Args:
        function: torchtitan's function.
        arguments: those of the call, by name.
        tp: its tensor parallel degree, compatible with the model under replication.

    Raises:
        KVReplicationError: the function, the model or the job does not go with replication.
    """
    model = arguments["model"]
    raise_if_foreign(function)
    if hasattr(model, "model_args"):
        from torchtitan_tp_validate.kv_replication.torchtitan_0_2 import (
            raise_if_unsupported,
            replicate_kv_heads,
        )

        raise_if_unsupported(arguments["job_config"])
        replicate_kv_heads(model, tp)
    elif not hasattr(model.config, "replicates_kv_heads"):
        raise unsupported_error(f"{type(model).__name__} was built from a config without it", HOW_TO_CONVERT)
