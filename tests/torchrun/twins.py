"""A rank of `test_low_precision`: ``python -m tests.torchrun.twins PRECISION[:SPMD_BACKEND]...``.

A model whose ranks share one key-value head is trained beside its twin: stock, with a head for each rank,
all of them copies of the one. What the twin's copies add to the gradients is summed: they are one weight.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from tests.torchrun.ending import end_rank
from torchtitan_tp_validate.rehearsal import parallelize
from torchtitan_tp_validate.rehearsal.cases import SEED, Case
from torchtitan_tp_validate.rehearsal.models import installed_line
from torchtitan_tp_validate.rehearsal.training import (
    LEARNING_RATE,
    batches,
    join_process_group,
    load_weights,
    named_parameters,
    whole,
)

LINE = installed_line()
LINE.HEAD_DIM = 32  # a block of MX
FAMILY, N_HEADS, STEPS = "qwen3", 4, 2


def converter(precision: str) -> Any:
    """Return the model-config converter of a low precision, as a CPU can emulate it."""
    if precision == "mxfp8":
        from torchtitan.components.quantization import mx

        with mock.patch.object(mx, "has_cuda_capability", return_value=True):
            return mx.MXFP8LinearConverter.Config(fqns=["attention", "feed_forward"]).build()
    from torchao.float8 import Float8LinearConfig
    from torchtitan.components.quantization.float8 import Float8LinearConverter

    # To emulate it, torchtitan takes one scale for a tensor, whatever the recipe is.
    made = Float8LinearConverter.Config(emulate=True, filter_fqns=["lm_head"]).build()
    if precision == "rowwise":
        recipe = Float8LinearConfig.from_recipe_name("rowwise")
        made.torchao_config = dataclasses.replace(recipe, emulate=True)
    return made


def convert(model: nn.Module, precision: str) -> None:
    """Have torchtitan 0.2.x put the linears of a low precision into a model, as a CPU can emulate it."""
    from torchtitan.components.quantization import float8, mx
    from torchtitan.config import JobConfig

    job = JobConfig()
    linear = job.quantize.linear
    linear.mx.recipe_name, linear.mx.mxfp8_dim1_cast_kernel_choice = "mxfp8_emulated", "torch"
    linear.float8.filter_fqns, linear.float8.emulate = ["output"], True
    linear.float8.recipe_name = precision if precision == "rowwise" else None
    if precision == "mxfp8":
        with mock.patch.object(mx, "has_cuda_capability", return_value=True):
            made = mx.MXLinearConverter(job, None)
    else:
        made = float8.Float8LinearConverter(job, mock.Mock(dp_shard_enabled=False))
        made.config = dataclasses.replace(made.config, emulate=True)  # of a recipe too
    made.convert(model)


def emulate(model: nn.Module) -> None:
    """Let MXFP8 linears multiply without a GPU; the gradient of a weight has no emulation."""
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    for module in model.modules():
        if hasattr(module, "kernel_preference"):
            module.kernel_preference, module.wgrad_with_hp = KernelPreference.EMULATED, True


class Trained:
    """One of the two models."""

    def __init__(self, precision: str, backend: str | None, n_kv_heads: int) -> None:
        tp = dist.get_world_size()
        shares = n_kv_heads < tp
        case = Case(FAMILY, tp=tp, n_heads=N_HEADS, n_kv_heads=n_kv_heads, as_trainer=True)
        case = dataclasses.replace(case, spmd_backend=backend, replicate_kv_heads=shares)
        self.tiny = LINE.build(
            FAMILY,
            n_heads=N_HEADS,
            n_kv_heads=n_kv_heads,
            tp=tp,
            upstream_check=False,
            spmd_backend=backend,
            replicate_kv_heads=shares,
            **({"converters": [converter(precision)]} if backend else {}),
        )
        if not backend:
            convert(self.tiny.model, precision)
            if shares:
                LINE.replicate_kv_heads(self.tiny.model, tp)
        device = torch.device("cpu")
        parallel_dims = parallelize.make_parallel_dims(self.tiny, case)
        self.model, self._context, _ = parallelize.parallelize(self.tiny, parallel_dims, case, device)
        self.tiny.initialize(self.model, device)
        if backend:
            emulate(self.model)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return all of them, whole."""
        return {name: whole(parameter) for name, parameter in named_parameters(self.model)}

    def step(self, seed: int) -> tuple[float, dict[str, torch.Tensor]]:
        """Return the loss of a batch, and the gradients, whole."""
        self.model.zero_grad()
        ((tokens, labels),) = batches(self.tiny, torch.device("cpu"), steps=1, seed=seed)
        with self._context():
            loss = self.tiny.loss(self.model, tokens, labels)
            loss.backward()
        return whole(loss).item(), {name: whole(p.grad) for name, p in named_parameters(self.model)}

    def descend(self) -> None:
        """Make a step of plain SGD."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter -= LEARNING_RATE * parameter.grad


def of_heads(name: str) -> bool:
    """Whether a parameter has the rows of key-value heads."""
    return ".wk." in name or ".wv." in name


def main(pairs: Sequence[str]) -> None:
    """Compare the two in every precision, on the backend beside it."""
    join_process_group(LINE)
    for pair in pairs:
        print(f"rank {dist.get_rank()}: {pair}: {compare(*pair.split(':'))}", flush=True)
    end_rank()


def compare(precision: str, backend: str | None = None) -> str:
    """Train both, and say how many gradients were the same."""
    torch.manual_seed(SEED)
    copies = dist.get_world_size()
    ours, twin = Trained(precision, backend, 1), Trained(precision, backend, copies)
    for step in range(STEPS):
        load_weights(
            twin.model, {n: w.repeat(copies, 1) if of_heads(n) else w for n, w in ours.weights().items()}
        )
        loss, gradients = ours.step(step)
        wanted_loss, wanted = twin.step(step)
        wanted = {n: g.unflatten(0, (copies, -1)).sum(0) if of_heads(n) else g for n, g in wanted.items()}
        assert loss == wanted_loss, (loss, wanted_loss)
        assert gradients.keys() == wanted.keys()
        different = [name for name in wanted if not torch.equal(gradients[name], wanted[name])]
        assert different == [], different
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())
        ours.descend()
    attention = ours.model.layers["0"].attention
    kind = type(getattr(attention, "qkv_linear", attention).wk).__name__
    return f"{kind}: {len(gradients)} equal"


if __name__ == "__main__":
    main(sys.argv[1:])
