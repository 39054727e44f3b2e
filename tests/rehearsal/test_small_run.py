"""What a small run does to a job's Trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as NS
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.rehearsal.small_run import SmallRun
from torchtitan_tp_validate.rehearsal.world import World


class Block(nn.Module):
    """A layer whose two experts got three tokens and two."""

    moe_enabled = True

    def __init__(self) -> None:
        super().__init__()
        counts, bias = torch.tensor([3.0, 2.0]), torch.zeros(2)
        self.moe = NS(load_balance_coeff=1.0, tokens_per_expert_E=counts, expert_bias_E=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def balanced(model: nn.Module) -> list[float]:
    """The bias of the experts after torchtitan has balanced them by these tokens."""
    from torchtitan.components.optimizer import register_moe_load_balancing_hook

    hooks: list[Any] = []
    dims = NS(get_optional_mesh=lambda _: None, ep_enabled=False, tp=1)
    register_moe_load_balancing_hook(NS(register_step_pre_hook=hooks.append), [model], dims)
    hooks[0]()
    bias: list[float] = model.get_submodule("layers")["0"].moe.expert_bias_E.tolist()  # type: ignore[index]
    return bias


@pytest.mark.requires(torchtitan=("0.3", "main"))
@pytest.mark.parametrize(("compiled", "bias"), [(False, [0.0, 0.0]), (True, [-1.0, 1.0])])
def test_tokens_that_what_is_compiled_counts_once_are_not_halved(
    compiled: bool, bias: list[float], tmp_path: Path
) -> None:
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": checkpoint_wrapper(Block())})
    line: Any = NS(build_trainer=lambda *_, **__: NS(model_parts=[model]))
    job, world = NS(compile=NS(enable=compiled)), World(Degrees(tp=1), 1, microbatches=1, cuts=())
    SmallRun(line, job, world, 1, tmp_path, set()).build_trainer(list, 1, 1)
    assert balanced(model) == bias
    x = torch.ones(1, requires_grad=True)
    model.layers["0"](x).backward()
    assert x.grad is not None
    assert x.grad.item() == 2
