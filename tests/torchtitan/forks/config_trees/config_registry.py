"""Its training config."""

from __future__ import annotations

from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from . import model_registry


def own_8b() -> Trainer.Config:
    """Return Llama's debug run, of the model with 8 billion parameters."""
    config = llama3_debugmodel()
    config.model_spec = model_registry("8B")
    return config
