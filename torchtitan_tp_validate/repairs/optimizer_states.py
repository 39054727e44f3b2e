"""CKPT006: save a state for every parameter that an optimizer trains, those without a gradient so far too.

Who resumes a run makes the states of all of them, and looks for each in the checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torchtitan_tp_validate.repairs.patching import Patch

_KNOWN = ("f9d87cd66a9e7c58",)


def patches() -> list[Patch]:
    """Return the patch of the function that makes states before they are saved or loaded."""
    module = "torchtitan.components.optimizer.utils"
    return [Patch(module, "init_optim_state", _KNOWN, _of_all, everywhere=True)]


def _of_all(init_optim_state: Callable[[Any], None]) -> Callable[[Any], None]:
    import torch

    @functools.wraps(init_optim_state)
    def repaired(optimizer: torch.optim.Optimizer) -> None:
        init_optim_state(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        without = [one for one in parameters if one.requires_grad and one not in optimizer.state]
        if not optimizer.state or not without:
            return
        gradients = [parameter.grad for parameter in parameters]
        rates = [group["lr"] for group in optimizer.param_groups]
        for parameter in parameters:
            parameter.grad = None
        for parameter in without:
            parameter.grad = torch.zeros_like(parameter)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            # Capturable and compiled optimizers keep it in a tensor.
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    return repaired
