"""A user's model, in a fork of torchtitan 0.2.x or in a package beside it: Llama, renamed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torchtitan.models import llama3
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from .infra.parallelize import parallelize_own


@dataclass
class OwnModelArgs(TransformerModelArgs):
    """Llama's."""


class OwnModel(Transformer):
    """Llama."""


own_args = {"8B": OwnModelArgs(**vars(llama3.llama3_args["8B"]))}


def get_train_spec() -> TrainSpec:
    """Return what torchtitan trains."""
    return replace(
        llama3.get_train_spec(),
        model_cls=OwnModel,
        model_args=own_args,
        parallelize_fn=parallelize_own,
        state_dict_adapter=None,
    )


if not __name__.startswith("torchtitan."):
    register_train_spec("own", get_train_spec())
