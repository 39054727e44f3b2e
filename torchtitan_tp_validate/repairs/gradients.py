"""Functions that change nothing on the way forward, or on the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_reduce


class _SumGradient(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(gradient.contiguous(), "sum", ctx.group), None


class _ScaleGradient(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


class _Scale(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        return tensor * factor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def sum_gradient(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Return the tensor; its gradient is summed over the ranks of the group."""
    summed: torch.Tensor = _SumGradient.apply(tensor, group)
    return summed


def scale_gradient(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the tensor; its gradient is multiplied by the factor."""
    scaled: torch.Tensor = _ScaleGradient.apply(tensor, factor)
    return scaled


def scale_forward(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the tensor multiplied by the factor; its gradient is not."""
    scaled: torch.Tensor = _Scale.apply(tensor, factor)
    return scaled
