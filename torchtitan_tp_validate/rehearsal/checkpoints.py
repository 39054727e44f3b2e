"""Checkpoints of a model with shared key-value heads, across degrees.

A model is trained for one AdamW step at each degree (the ranks that are left shard the data): stock, or
shared where there are more ranks than heads. Every checkpoint is then loaded at every other degree.
The weights alone are loaded across a fused QKV projection and three, too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.models import TinyModel
from torchtitan_tp_validate.rehearsal.parallelize import Guards, build, make_parallel_dims, parallelize
from torchtitan_tp_validate.rehearsal.training import batches, whole


@dataclass
class _Seen:
    """What one rank saw.

    Attributes:
        loaded: ``"4->2"`` -> how many tensors were loaded.
        different: those that were not, bit for bit, what had been saved.
        resumed: ``"4->2"`` -> the loss of the next step.
        weights: ``"4->stock"`` -> how many weights were loaded by or from stock TP 2, where QKV is fused.
        exported: TP degree -> how many tensors the Hugging Face adapter made of the sharded model.
        exported_differently: those that are not those of TP 1, which `hugging_face` holds until the end, and
            the weights that the adapter does not make of them again.
    """

    loaded: dict[str, int] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)
    resumed: dict[str, float] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    exported: dict[int, int] = field(default_factory=dict)
    exported_differently: list[str] = field(default_factory=list)
    hugging_face: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Run:
    """A model at one degree, with its optimizer."""

    case: Case
    tiny: TinyModel
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device

    def step(self, batch: int) -> float:
        """Return the loss of a batch, on which the model is then trained."""
        tokens, labels = list(batches(self.tiny, self.device, steps=batch + 1, seed=self.case.seed))[batch]
        self.model.zero_grad()
        loss = self.tiny.loss(self.model, tokens, labels)
        loss.backward()
        self.optimizer.step()
        total = whole(loss)
        dist.all_reduce(total)
        return float(total.item() / dist.get_world_size())

    def state(self) -> dict[str, Any]:
        """Return model and optimizer, under the names that torchtitan's checkpoints have."""
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        return {
            **get_model_state_dict(self.model),
            **get_optimizer_state_dict(self.model, self.optimizer, options=flat),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state that `state` has the shape of."""
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        names = get_model_state_dict(self.model).keys()
        set_model_state_dict(self.model, {name: state[name] for name in names})
        rest = {name: value for name, value in state.items() if name not in names}
        set_optimizer_state_dict(self.model, self.optimizer, rest, options=flat)


def move_checkpoints(
    case: Case, line: ModuleType, device: torch.device, guards: Guards, folder: Path
) -> dict[str, Any]:
    """Return what this rank saw of the checkpoints of the case's model.

    Args:
        folder: where the checkpoints lie.
    """
    seen = _Seen()
    degrees = [int(degree) for degree in case.checkpoints.split("-")]
    fused = case.family in line.FUSED_QKV

    def at(tp: int, *, replicate: bool) -> _Run:
        shared = replace(case, tp=tp, dp=case.world_size // tp, replicate_kv_heads=replicate)
        guards.before_build(shared)
        tiny = build(line, shared)
        model, *_ = parallelize(tiny, make_parallel_dims(tiny, shared), shared, device)
        torch.manual_seed(case.seed)
        tiny.initialize(model, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        return _Run(shared, tiny, model, optimizer, device)

    # The optimizer's state is named after the parameters: fused projections are three at every degree.
    runs = {tp: at(tp, replicate=tp > case.n_kv_heads or fused) for tp in degrees}
    saved = {}
    for tp, run in runs.items():
        run.step(0)
        state = run.state()
        saved[tp] = {name: _copy(value) for name, value in state.items()}
        dcp.save(state, checkpoint_id=folder / f"tp{tp}")
    _export(runs[1], seen)
    for source in degrees:
        for target in degrees:
            if source == target:
                continue
            run, name = runs[target], f"{source}->{target}"
            # Something else than what is to be loaded.
            run.step(2)
            state = run.state()
            dcp.load(state, checkpoint_id=folder / f"tp{source}")
            run.load(state)
            loaded = {key: _copy(value) for key, value in run.state().items()}
            seen.loaded[name] = len(loaded)
            assert loaded.keys() == saved[source].keys(), loaded.keys() ^ saved[source].keys()
            seen.different += [
                f"{name}: {key}" for key, value in loaded.items() if not _same(value, saved[source][key])
            ]
            if source == 1:
                _export(run, seen)
            seen.resumed[name] = run.step(1)
    if fused:
        stock = at(2, replicate=False)
        _move_weights(runs[degrees[-1]], stock, f"{degrees[-1]}->stock", folder, seen)
        stock.step(0)
        _move_weights(stock, runs[degrees[-1]], f"stock->{degrees[-1]}", folder, seen)
    seen.hugging_face.clear()
    return asdict(seen)


def _move_weights(source: _Run, target: _Run, name: str, folder: Path, seen: _Seen) -> None:
    """Save the weights of one run and load them into another, as torchtitan 0.3.x does."""
    state = source.model.state_dict()
    wanted = {key: _copy(value) for key, value in state.items()}
    dcp.save(state, checkpoint_id=folder / name)
    state = target.model.state_dict()
    dcp.load(state, checkpoint_id=folder / name)
    target.model.load_state_dict(state)
    loaded = {key: _copy(value) for key, value in target.model.state_dict().items()}
    assert loaded.keys() == wanted.keys(), loaded.keys() ^ wanted.keys()
    seen.weights[name] = len(loaded)
    seen.different += [f"{name}: {key}" for key, value in loaded.items() if not _same(value, wanted[key])]


def _export(run: _Run, seen: _Seen) -> None:
    """Have the Hugging Face adapter of this model export its weights, and compare with those of TP 1.

    Where experts are sharded, it gives each rank those that it holds.
    """
    if run.case.lora:
        # Hugging Face's names are those of the weights alone.
        return
    adapter = run.tiny.hf_adapter()
    state = get_model_state_dict(run.model)
    exported = adapter.to_hf(state)
    imported = adapter.from_hf(exported)
    seen.exported_differently += [
        f"TP {run.case.tp}: {name} back again"
        # In the same order on every rank: they put each together.
        for name in sorted(state.keys() | imported.keys())
        # Hugging Face has no such buffer.
        if ".moe.expert_bias" not in name
        if not _same(_copy(imported.get(name)), _copy(state.get(name)))
    ]
    exported = {name: _copy(value) for name, value in exported.items()}
    if run.case.tp == 1 and not seen.hugging_face:
        seen.hugging_face = _of_all_ranks(exported)
    names = _of_all_ranks(dict.fromkeys(exported))
    seen.exported[run.case.tp] = len(names)
    seen.exported_differently += [
        f"TP {run.case.tp}: {name}"
        for name in names.keys() | seen.hugging_face.keys()
        if name not in names or (name in exported and not _same(exported[name], seen.hugging_face[name]))
    ]


def _of_all_ranks(mine: dict[str, Any]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}


def _copy(value: Any) -> Any:
    return whole(value) if isinstance(value, torch.Tensor) else value


def _same(a: Any, b: Any) -> bool:
    both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return torch.equal(a, b) if both else type(a) is type(b) and bool(a == b)
