"""Set up ranks, load weights into a model, train it, and compare its gradients with others."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from torchtitan_tp_validate.rehearsal.models import TinyModel

BATCH_SIZE = 2
LEARNING_RATE = 0.1
MAX_NORM = 1.0
# A machine with fewer cores than ranks can be slow to reach a collective.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)

# Levels that activation checkpointing and torch.compile put into a parameter's name.
_WRAPPER_NAMES = ("_checkpoint_wrapped_module", "_orig_mod")

Gradients = dict[str, torch.Tensor]
Context = Callable[[], AbstractContextManager[None]]


@dataclass
class Step:
    """The loss of one training step, the gradient of every parameter, and their norm if they are clipped."""

    loss: float
    gradients: Gradients
    norm: float = 0.0


@dataclass
class Difference:
    """How far gradients are from their reference, over all parameters and steps added so far.

    A relative difference is the largest absolute one within a parameter over the largest entry of that
    parameter's reference gradient. Where a parameter has outgrown its reference, as torchtitan 0.3.x can
    make it without a word, the part that they share is compared.
    """

    absolute: float = 0.0
    relative: float = 0.0
    worst: str | None = None
    compared: int = 0
    reshaped: str | None = None

    def add(self, seen: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
        """Compare the gradients of one step."""
        if seen.keys() != wanted.keys():
            raise AssertionError(f"gradients differ: {sorted(seen.keys() ^ wanted.keys())}")
        for name, gradient in wanted.items():
            if seen[name].shape != gradient.shape:
                self.reshaped = f"{name} is {tuple(seen[name].shape)}, not {tuple(gradient.shape)}"
            shared = seen[name][tuple(map(slice, gradient.shape))]
            difference = (shared - gradient).abs().max().item()
            relative = relative_difference(difference, gradient.abs().max().item())
            self.compared += 1
            self.absolute = max(self.absolute, math.inf if math.isnan(difference) else difference)
            if relative >= self.relative:
                self.relative = relative
                self.worst = name


def relative_difference(difference: float, scale: float) -> float:
    """Return a difference as a part of what it is compared with; not a number counts as infinite."""
    if math.isnan(difference) or not math.isfinite(scale):
        return math.inf
    if scale:
        return abs(difference / scale)
    return math.inf if difference else 0.0


def join_process_group(line: ModuleType) -> torch.device:
    """Set this process up as a rank, on the device that `choose_device` says."""
    device = choose_device()
    line.prepare(device.type)
    open_process_group(device)
    return device


def choose_device() -> torch.device:
    """Return a GPU per rank where there are enough of them, otherwise the CPU for all ranks."""
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


def open_process_group(device: torch.device, attempt: int = 0) -> None:
    """Join the other ranks of this torchrun.

    Args:
        attempt: how many process groups this torchrun has had before; in its store, each has its own keys.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=COLLECTIVE_TIMEOUT)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        store=dist.PrefixStore(f"attempt{attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def collectives() -> list[int]:
    """Return how many collectives this rank has entered so far, for each of its process groups."""
    groups = dist.distributed_c10d._world.pg_map
    # The stand-in for a mesh dimension of size 1 never communicates, and has no counter.
    real = [group for group in groups if dist.get_backend(group) != "fake"]
    return [group._get_sequence_number_for_group() for group in real]


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters under the names they have in a model that nothing has wrapped."""
    for name, parameter in model.named_parameters():
        yield plain_name(name), parameter


def plain_name(name: str) -> str:
    """Return the name that a parameter or module has in a model that nothing has wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES)


def copy_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of a plain model, by name."""
    return {name: weight.detach().clone() for name, weight in named_parameters(model)}


def unfused(model: nn.Module, tensors: Gradients) -> Gradients:
    """Return weights or gradients of a fused QKV projection as those of three, by torchtitan's own hook."""
    result = dict(tensors)
    for name, module in model.named_modules():
        split = getattr(module, "_split_qkv_on_save", None)
        if split is not None:
            split(module, result, f"{name}.", {})
    return result


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a model, parallelized or not, these weights; those of three projections, if its own is fused."""
    weights = dict(weights)
    for name, module in model.named_modules():
        merge = getattr(module, "_merge_qkv_on_load", None)
        if merge is not None and f"{name}.wqkv.weight" not in weights:
            merge(module, weights, f"{name}.")
    parameters = dict(named_parameters(model))
    if parameters.keys() != weights.keys():
        raise AssertionError(f"parameters differ: {sorted(parameters.keys() ^ weights.keys())}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            copy_whole(parameter, weights[name])


def copy_whole(parameter: nn.Parameter, weight: torch.Tensor) -> None:
    """Give a parameter this whole weight; a collective if the parameter is sharded.

    Where the parameter is larger than the weight, what the weight does not reach stays as it is.
    """
    weight = weight.to(parameter.device)
    if isinstance(parameter, DTensor):
        if parameter.shape != weight.shape:
            whole = parameter.full_tensor()
            whole[tuple(map(slice, weight.shape))] = weight
            weight = whole
        weight = distribute_tensor(weight, parameter.device_mesh, parameter.placements).to_local()
        parameter = parameter.to_local()
        # An empty shard may have another shape here and there.
        weight = weight.view_as(parameter)
    parameter.copy_(weight)


def batches(
    tiny: TinyModel, device: torch.device, *, steps: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the same tokens and labels on every rank, of shape (BATCH_SIZE, seq_len)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        text = torch.randint(tiny.vocab_size, (BATCH_SIZE, tiny.seq_len + 1), generator=generator).to(device)
        yield text[:, :-1].contiguous(), text[:, 1:].contiguous()


def train(
    tiny: TinyModel,
    model: nn.Module,
    device: torch.device,
    *,
    steps: int,
    seed: int,
    enter: Callable[[str], None],
    rows: slice = slice(None),
    context: Context = nullcontext,
    pipeline: Any = None,
    clip: Callable[[list[nn.Parameter]], torch.Tensor] | None = None,
) -> Iterator[Step]:
    """Train on batches drawn from ``seed``.

    Args:
        enter: is told where it is.
        rows: of each batch, those that are this rank's.
        context: what torchtitan's Trainer has open around each step.
        pipeline: the `Pipeline` that the model is a stage of.
        clip: clips the gradients of the parameters and returns their norm.
    """
    parameters = dict(named_parameters(model))
    # Plain SGD: an adaptive optimizer would turn rounding in a tiny gradient into a whole step.
    optimizer = torch.optim.SGD(parameters.values(), lr=LEARNING_RATE)
    for tokens, labels in batches(tiny, device, steps=steps, seed=seed):
        model.zero_grad()
        enter("forward")
        if pipeline is not None:
            loss = torch.tensor(pipeline.step(tokens, labels))
        else:
            with context():
                loss = tiny.loss(model, tokens[rows].contiguous(), labels[rows].contiguous())
                enter("backward")
                loss.backward()
        enter("gradients")
        # A parameter that the batch does not reach (a vision tower without images) has none.
        gradients = {name: whole(p.grad) for name, p in parameters.items() if p.grad is not None}
        norm = whole(clip(list(parameters.values()))).item() if clip else 0.0
        enter("optimizer")
        optimizer.step()
        yield Step(whole(loss).item(), gradients, norm)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, put together from all ranks if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
