"""One process of a rehearsal: torchtitan's Trainer, and what is seen of its steps.

The reference (one process, all degrees 1) leaves its weights and gradients in ``reference.pt``. A rank starts
from these weights, and compares every gradient with them, as whole as the ranks make it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._guards import detect_fake_mode
from torch.distributed.tensor import DTensor

from torchtitan_tp_validate.rehearsal.models import sum_gradients_without_nccl
from torchtitan_tp_validate.rehearsal.training import (
    copy_weights,
    load_weights,
    named_parameters,
    plain_name,
    whole,
)

STEPS = 2
_SEED = 20
_ROUNDING = 1e-5
"""Of the norm of all gradients. One that is smaller is made of differences of larger ones, to few digits."""

_TOKENS_DIMS = 3
"""Of (batch, seq_len, width)."""


@dataclass
class Seen:
    """A tensor of this run beside the reference's.

    Attributes:
        name: the parameter.
        distance: norm of the difference over that of the reference.
        factor: of the multiple of the reference that comes closest.
        rest: norm of what is left then, over that of the reference.
        layout: how the ranks share the parameter.
    """

    name: str
    distance: float
    factor: float
    rest: float
    layout: str = ""


@dataclass
class Record:
    """What one process saw.

    Attributes:
        losses, norms: of each step; a rank without the last stage of a pipeline has no loss.
        gradients: of each step, in the order of the model.
        outputs: module -> relative distance of what it computed in the first forward pass, in the order in
            which they were done; those that cannot be laid beside the reference's are left out.
        validations: the loss of each validation, which a rank without the last stage has none of either.
        states: what the optimizer holds of each parameter after the last step of a run that has resumed.
        drift: the parameters whose copies on several ranks are not equal any more after the last step.
        trainable: the parameters that have a gradient.
        uninitialized: weights and buffers that nothing is written to before the first step.
        first_step: from 1; a run that has resumed begins later.
    """

    losses: list[float | None] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[list[Seen]] = field(default_factory=list)
    outputs: dict[str, float] = field(default_factory=dict)
    validations: list[float | None] = field(default_factory=list)
    states: list[Seen] = field(default_factory=list)
    drift: list[str] = field(default_factory=list)
    trainable: list[str] = field(default_factory=list)
    uninitialized: list[str] = field(default_factory=list)
    stand_ins: list[str] = field(default_factory=list)
    first_step: int = 1


def beside(name: str, seen: torch.Tensor, wanted: torch.Tensor, layout: str = "", least: float = 0.0) -> Seen:
    """Compare a tensor with what it should be.

    Args:
        least: the norm of the reference that a distance is taken relative to, where it has a smaller one.
    """
    if seen.shape != wanted.shape:
        return Seen(name, math.inf, math.nan, math.inf, f"{tuple(seen.shape)}, not {tuple(wanted.shape)}")
    seen, wanted = seen.double().flatten(), wanted.double().flatten()
    scale = float(wanted.norm())
    if not scale:
        return Seen(name, math.inf if float(seen.norm()) else 0.0, math.nan, 0.0, layout)
    factor = float(seen @ wanted) / scale**2
    scale = max(scale, least)
    distance, rest = float((seen - wanted).norm()) / scale, float((seen - factor * wanted).norm()) / scale
    return Seen(name, math.inf if math.isnan(distance) else distance, factor, rest, layout)


class Process:
    """A run of the Trainer, watched.

    Args:
        out: the folder of the rehearsal.
        enter: is told where the run is.
        keep: leave a rank's gradients in the folder, too.
        outputs: compare what modules compute.
        resumes: ranks save a checkpoint, from which others train one more step.
        validates: the first step is followed by a validation, as torchtitan's is.
    """

    def __init__(
        self,
        out: Path,
        enter: Callable[[str], None],
        *,
        keep: bool = False,
        outputs: bool = True,
        resumes: bool = False,
        validates: bool = False,
    ) -> None:
        self._out = out
        self._enter = enter
        self._keep = keep
        self._outputs = outputs
        self._resumes = resumes
        self._validates = validates
        self.record = Record()

    def reference(self, build: Callable[[], Any]) -> None:
        """Run as the one process that all ranks are compared with."""
        steps: list[dict[str, torch.Tensor]] = []
        torch.manual_seed(_SEED)
        trainer = self._build(build)
        (model,) = trainer.model_parts
        drawn = _draw_uninitialized(model)
        self.record.uninitialized = [*drawn]
        _draw_again(model)
        weights = {name: whole(weight) for name, weight in copy_weights(model).items()}
        outputs: dict[str, torch.Tensor] = {}
        if self._outputs:
            watch_outputs(model, outputs.__setitem__)

        def take(name: str, gradient: torch.Tensor | None) -> None:
            if gradient is not None:
                steps[-1][name] = gradient

        self._train(trainer, take, lambda: steps.append({}), STEPS + self._resumes)
        states = dict(_optimizer_states(trainer)) if self._resumes else {}
        content = {
            "weights": weights,
            "uninitialized": drawn,
            "steps": steps,
            "outputs": outputs,
            "states": states,
        }
        torch.save(content, self._out / "reference.pt")

    def rank(self, build: Callable[[], Any]) -> None:
        """Run as one of the ranks."""
        trainer, reference = self._build_rank(build)
        for model in trainer.model_parts:
            # One that is not the reference's is told as trained in one place only.
            load_weights(model, {n: reference["weights"].get(n, p) for n, p in named_parameters(model)})
            if self._outputs:
                watch_outputs(model, partial(self._compare_output, reference["outputs"]))
        kept = self._compare_gradients(trainer, reference, STEPS)
        if self._keep:
            torch.save({"steps": kept}, self._out / f"rehearsal-rank{dist.get_rank()}.pt")
        if self._resumes:
            self._enter("saving a checkpoint")
            _without_data(trainer.checkpointer).save(STEPS)

    def resumed_rank(self, build: Callable[[], Any]) -> None:
        """Run as one of the ranks that go on from the checkpoint that those before have left."""
        self.record.first_step = STEPS + 1
        trainer, reference = self._build_rank(build)
        for model in trainer.model_parts:
            _spoil(model)
        self._enter("loading a checkpoint")
        if not _without_data(trainer.checkpointer).load(-1):
            raise RuntimeError("torchtitan finds no checkpoint in its folder")
        self._compare_gradients(trainer, reference, 1)
        self._enter("comparing the state of the optimizer")
        wanted = reference["states"]
        squares: dict[str, float] = defaultdict(float)
        for (_, what), state in wanted.items():
            squares[what] += float(state.double().norm()) ** 2
        self.record.states = [
            beside(f"{name}: {what}", seen, wanted[name, what], least=_ROUNDING * math.sqrt(squares[what]))
            for (name, what), seen in _optimizer_states(trainer)
            # What has no gradient has none in one process, and zeros once it is loaded.
            if (name, what) in wanted
        ]

    def _build_rank(self, build: Callable[[], Any]) -> tuple[Any, Mapping[str, Any]]:
        """Return the Trainer of a rank, and what it is compared with."""
        reference = torch.load(self._out / "reference.pt", mmap=True)
        trainer = self._build(build)
        for model in trainer.model_parts:
            sum_gradients_without_nccl(model)
            for name, tensor in _uninitialized(model):
                # Weights are loaded.
                if name in reference["uninitialized"] and not isinstance(tensor, nn.Parameter):
                    _local(tensor).copy_(reference["uninitialized"][name])
        return trainer, reference

    def _compare_gradients(
        self, trainer: Any, reference: Mapping[str, Any], steps: int
    ) -> list[dict[str, torch.Tensor]]:
        """Train so many steps, and compare; return the gradients of each, if they are kept."""
        layouts = {
            name: str(p.placements) if isinstance(p, DTensor) else "replicated"
            for model in trainer.model_parts
            for name, p in named_parameters(model)
        }
        kept: list[dict[str, torch.Tensor]] = []

        def begin() -> None:
            self.record.gradients.append([])
            kept.append({})

        norms = [
            math.sqrt(sum(float(gradient.double().norm()) ** 2 for gradient in step.values()))
            for step in reference["steps"]
        ]

        def compare(name: str, gradient: torch.Tensor | None) -> None:
            gradients = self.record.gradients
            if self._keep and gradient is not None:
                kept[-1][name] = gradient
            step = self.record.first_step + len(gradients) - 2
            wanted = reference["steps"][step]
            if name in wanted:
                # What nobody has computed is nothing.
                gradient = torch.zeros_like(wanted[name]) if gradient is None else gradient
                least = _ROUNDING * norms[step]
                gradients[-1].append(beside(name, gradient, wanted[name], layouts[name], least))

        self._train(trainer, compare, begin, steps)
        self._enter("comparing copies")
        self.record.drift = [
            name
            for model in trainer.model_parts
            for name, parameter in named_parameters(model)
            if _copies_differ(parameter, trainer.parallel_dims)
        ]
        return kept

    def _compare_output(self, wanted: Mapping[str, torch.Tensor], name: str, seen: torch.Tensor) -> None:
        parts = list(_parts(wanted[name], seen)) if name in wanted else []
        if parts:
            self.record.outputs[name] = min(beside(name, seen, part).distance for part in parts)

    def _build(self, build: Callable[[], Any]) -> Any:
        self._enter("building and parallelizing the model")
        # Memory that nobody has written to is not a number then, and not what was there before.
        torch.use_deterministic_algorithms(True, warn_only=True)
        trainer = build()
        torch.use_deterministic_algorithms(False)
        return trainer

    def _train(
        self,
        trainer: Any,
        take: Callable[[str, torch.Tensor | None], None],
        begin: Callable[[], None],
        steps: int,
    ) -> None:
        parts = trainer.model_parts
        self.record.trainable = [n for m in parts for n, p in named_parameters(m) if p.requires_grad]

        def look() -> None:
            self._enter("gathering gradients")
            begin()
            for model in parts:
                for name, parameter in named_parameters(model):
                    take(name, None if parameter.grad is None else whole(parameter.grad))
            self._enter("clipping gradients")

        with _watched(trainer, self.record, look):
            batches = trainer.batch_generator(trainer.dataloader)
            for step in range(self.record.first_step, self.record.first_step + steps):
                self._enter(f"forward or backward of step {step}")
                trainer.step = step
                trainer.train_step(batches)
                if self._validates and step == 1:
                    self._enter("validating")
                    trainer.validator.validate(trainer.model_parts, step)


def _uninitialized(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights and buffers of a model that hold what the memory held before."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if bool(whole(tensor).isnan().any()):
            yield plain_name(name), tensor


def _optimizer_states(trainer: Any) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
    """Yield what the optimizer holds of each parameter, by name and kind, and its learning rate."""
    names = {parameter: name for model in trainer.model_parts for name, parameter in named_parameters(model)}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                yield (name, "learning rate"), torch.as_tensor(group["lr"]).clone()
                for what, state in optimizer.state.get(parameter, {}).items():
                    if isinstance(state, torch.Tensor):
                        yield (name, what), whole(state)


def _without_data(checkpointer: Any) -> Any:
    """Return torchtitan's checkpointer, which leaves out the rehearsal's batches: they have no state."""
    checkpointer.states.pop("dataloader", None)
    return checkpointer


@torch.no_grad()  # type: ignore[untyped-decorator]
def _spoil(model: nn.Module) -> None:
    """Give every parameter other values: those that no checkpoint replaces show then."""
    for parameter in model.parameters():
        _local(parameter).normal_()


def watch_outputs(model: nn.Module, take: Callable[[str, torch.Tensor], None]) -> None:
    """Have taken what each module computes the first time, if it has a value for every token."""
    seen: set[str] = set()

    def hook(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        is_first = name not in seen and isinstance(output, torch.Tensor) and output.dim() == _TOKENS_DIMS
        # While a graph is traced (torchtitan's graph_trainer) nothing is computed.
        if is_first and detect_fake_mode(output) is None:
            seen.add(name)
            take(name, whole(output))

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(partial(hook, plain_name(name)))


def _parts(whole: torch.Tensor, part: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield every part of a tensor that may be a rank's: a chunk of each dimension that is cut."""
    if part.dim() != whole.dim() or any(n % p for n, p in zip(whole.shape, part.shape, strict=True)):
        return
    chunks = [range(0, n, p) for n, p in zip(whole.shape, part.shape, strict=True)]
    for starts in itertools.product(*chunks):
        yield whole[tuple(slice(start, start + p) for start, p in zip(starts, part.shape, strict=True))]


@contextmanager
def _watched(trainer: Any, record: Record, look: Callable[[], None]) -> Iterator[None]:
    """Look at the gradients before they are clipped, and note norm and loss of every step."""
    from torchtitan.distributed import utils

    clip = utils.clip_grad_norm_
    has_loss = getattr(trainer, "pp_has_last_stage", True)

    def clip_grad_norm_(*args: Any, **kwargs: Any) -> torch.Tensor:
        look()
        norm: torch.Tensor = clip(*args, **kwargs)
        record.norms.append(float(whole(norm)))
        return norm

    def log(step: int, global_avg_loss: float, *_: Any, **__: Any) -> None:
        del step
        record.losses.append(float(global_avg_loss) if has_loss else None)

    def log_validation(loss: float, *_: Any, **__: Any) -> None:
        record.validations.append(float(loss) if has_loss else None)

    with (
        mock.patch.object(utils, "clip_grad_norm_", clip_grad_norm_),
        mock.patch.object(trainer.metrics_processor, "log", log),
        mock.patch.object(trainer.metrics_processor, "log_validation", log_validation),
        mock.patch.object(trainer.metrics_processor, "should_log", return_value=True),
    ):
        yield


@torch.no_grad()  # type: ignore[untyped-decorator]
def _draw_uninitialized(model: nn.Module) -> dict[str, torch.Tensor]:
    """Give what is not initialized values for all ranks to share, so that the rest can be compared."""
    found = dict(_uninitialized(model))
    for tensor in found.values():
        _local(tensor).uniform_()
    return {name: whole(tensor).detach().clone() for name, tensor in found.items()}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()  # type: ignore[untyped-decorator]
def _draw_again(model: nn.Module) -> None:
    """Give every parameter that starts at nothing, or all alike, some of its own: alike tells nothing."""
    for parameter in model.parameters():
        local = _local(parameter)
        if local.numel() > 1 and float(local.std()) == 0.0:
            local.add_(torch.randn_like(local), alpha=0.02)


def _copies_differ(parameter: nn.Parameter, parallel_dims: Any) -> bool:
    """Whether a parameter has copies on several ranks that are not equal."""
    local, meshes = parameter.detach(), []
    named: tuple[str, ...] = ()
    if isinstance(parameter, DTensor):
        mesh, local = parameter.device_mesh, parameter.to_local().detach()
        named = mesh.mesh_dim_names or ()
        meshes = [mesh.get_group(i) for i, p in enumerate(parameter.placements) if p.is_replicate()]
    if hasattr(parallel_dims, "get_optional_mesh"):
        tp = parallel_dims.get_optional_mesh("tp")
    else:  # 0.2.0
        tp = parallel_dims.world_mesh["tp"] if parallel_dims.tp_enabled else None
    # Tensor parallelism of a layer that it knows nothing of, and experts that are dealt out over its ranks.
    if tp is not None and not {"tp", "ep"} & set(named):
        meshes.append(tp.get_group())
    differ = False
    for group in meshes:
        most, least = local.clone(), local.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group)
        dist.all_reduce(least, dist.ReduceOp.MIN, group)
        differ |= bool((most != least).any())
    return differ


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content), encoding="utf-8")
    draft.rename(path)
