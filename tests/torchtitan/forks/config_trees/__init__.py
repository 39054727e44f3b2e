"""A user's model, in a fork of torchtitan 0.3.x or main or in a package beside it: Llama, renamed."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.llama3 import llama3_configs
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.protocols.model_spec import ModelSpec

from .parallelize import parallelize_own


class OwnModel(Llama3Model):
    """Llama."""

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        """Llama's."""


own_configs = {"8B": llama3_configs["8B"]}


def model_registry(flavor: str) -> ModelSpec:
    """Return the spec of a flavor."""
    llama = own_configs[flavor](attn_backend="flex")
    return ModelSpec(
        name="own",
        flavor=flavor,
        model=OwnModel.Config(**{f.name: getattr(llama, f.name) for f in fields(llama) if f.init}),
        parallelize_fn=parallelize_own,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )
