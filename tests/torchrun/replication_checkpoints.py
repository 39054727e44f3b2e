"""One rank of a torchrun test: checkpoints of a model with shared key-value heads, across degrees.

    torchrun --nproc-per-node 4 -m tests.torchrun.replication_checkpoints --family qwen3 --out DIR

Each family is trained for one AdamW step at TP 1, 2 and 4 (the ranks that are left shard the data), with two
key-value heads: stock at TP 1 and 2, shared at TP 4. Every checkpoint is then loaded at every other degree.
The weights alone are loaded across a fused QKV projection and three, too.
``DIR/rank{RANK}.json`` holds a `Report` for every family.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
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
from torch.distributed.elastic.multiprocessing.errors import record

from tests.torchrun import lines
from tests.torchrun.lines import TinyModel
from tests.torchrun.replication import (
    SEED,
    Case,
    batches,
    build,
    parallelize,
    replicating,
)
from tests.torchrun.training import join_process_group, whole

DEGREES = (1, 2, 4)
FUSED = ("qwen3_fused", "llama3") if hasattr(lines.installed_line(), "UPSTREAM_CHECKS") else ()
"""The families whose stock model has a fused QKV projection."""


@dataclass
class Report:
    """What one rank saw.

    Attributes:
        loaded: ``"4->2"`` -> how many tensors were loaded.
        different: those that were not, bit for bit, what had been saved.
        resumed: ``"4->2"`` -> the loss of the next step.
        weights: ``"4->stock"`` -> how many weights were loaded by or from stock TP 2, where QKV is fused.
        exported: TP degree -> how many tensors the Hugging Face adapter made of the sharded model.
        export_errors: TP degree -> why it could not, and made them of whole tensors.
        exported_differently: those that are not those of TP 1, which `hugging_face` holds until the end, and
            the weights that the adapter does not make of them again.
    """

    family: str
    rank: int
    loaded: dict[str, int] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)
    resumed: dict[str, float] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    exported: dict[int, int] = field(default_factory=dict)
    export_errors: dict[int, str] = field(default_factory=dict)
    exported_differently: list[str] = field(default_factory=list)
    hugging_face: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """A model at one degree, with its optimizer."""

    tp: int
    tiny: TinyModel
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, batch: int) -> float:
        """The loss of a batch, on which the model is then trained."""
        device = torch.device("cpu")
        tokens, labels = list(batches(self.tiny, device, batch + 1))[batch]
        self.model.zero_grad()
        loss = self.tiny.loss(self.model, tokens.contiguous(), labels.contiguous())
        loss.backward()
        self.optimizer.step()
        total = whole(loss)
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()

    def state(self) -> dict[str, Any]:
        """Model and optimizer, under the names that torchtitan's checkpoints have."""
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


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--family", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    line = lines.installed_line()
    join_process_group(line)
    reports = []
    for family in options.family:
        reports.append(Report(family, dist.get_rank()))
        _round_trips(family, line, options.out / family, reports[-1])
        reports[-1].hugging_face.clear()
    path = options.out / f"rank{dist.get_rank()}.json"
    path.write_text(json.dumps([asdict(report) for report in reports], indent=2), encoding="utf-8")
    dist.destroy_process_group()


def _round_trips(family: str, line: ModuleType, folder: Path, report: Report) -> None:
    runs = {tp: _run(family, tp, line) for tp in DEGREES}
    saved = {}
    for tp, run in runs.items():
        run.step(0)
        state = run.state()
        saved[tp] = {name: _copy(value) for name, value in state.items()}
        dcp.save(state, checkpoint_id=folder / f"tp{tp}")
    _export(runs[1], report)
    for source in DEGREES:
        for target in DEGREES:
            if source == target:
                continue
            run, name = runs[target], f"{source}->{target}"
            # Something else than what is to be loaded.
            run.step(2)
            state = run.state()
            dcp.load(state, checkpoint_id=folder / f"tp{source}")
            run.load(state)
            loaded = {key: _copy(value) for key, value in run.state().items()}
            report.loaded[name] = len(loaded)
            assert loaded.keys() == saved[source].keys(), loaded.keys() ^ saved[source].keys()
            report.different += [
                f"{name}: {key}" for key, value in loaded.items() if not _same(value, saved[source][key])
            ]
            if source == 1:
                _export(run, report)
            report.resumed[name] = run.step(1)
    if family in FUSED:
        stock = _run(family, 2, line, replicate=False)
        _move_weights(runs[4], stock, "4->stock", folder, report)
        stock.step(0)
        _move_weights(stock, runs[4], "stock->4", folder, report)


def _move_weights(source: Run, target: Run, name: str, folder: Path, report: Report) -> None:
    """Save the weights of one run and load them into another, as torchtitan 0.3.x does."""
    state = source.model.state_dict()
    wanted = {key: _copy(value) for key, value in state.items()}
    dcp.save(state, checkpoint_id=folder / name)
    state = target.model.state_dict()
    dcp.load(state, checkpoint_id=folder / name)
    target.model.load_state_dict(state)
    loaded = {key: _copy(value) for key, value in target.model.state_dict().items()}
    assert loaded.keys() == wanted.keys(), loaded.keys() ^ wanted.keys()
    report.weights[name] = len(loaded)
    report.different += [f"{name}: {key}" for key, value in loaded.items() if not _same(value, wanted[key])]


def _run(family: str, tp: int, line: ModuleType, replicate: bool | None = None) -> Run:
    if replicate is None:
        # The optimizer's state is named after the parameters: fused projections are three at every degree.
        replicate = tp == 4 or family in FUSED
    case = Case.parse(f"{family}:8/2:tp={tp}")
    sizes = {"num_experts": 8} if "num_experts" in line.SIZES[family] else {}
    with replicating(replicate):
        tiny = build(case, line, replicate_kv_heads=replicate, sizes=sizes)
        model, _ = parallelize(tiny, case)
    torch.manual_seed(SEED)
    tiny.initialize(model, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    return Run(tp, tiny, model, optimizer)


def _export(run: Run, report: Report) -> None:
    """Have the Hugging Face adapter of this model export its weights, and compare with those of TP 1.

    Where experts are sharded, it gives each rank those that it holds.
    """
    adapter = run.tiny.hf_adapter()
    state = get_model_state_dict(run.model)
    try:
        exported = adapter.to_hf(state)
    except RuntimeError as error:
        report.export_errors[run.tp] = str(error)
        state = {name: _copy(value) for name, value in state.items()}
        exported = adapter.to_hf(state)
    imported = adapter.from_hf(exported)
    report.exported_differently += [
        f"TP {run.tp}: {name} back again"
        # In the same order on every rank: they put each together.
        for name in sorted(state.keys() | imported.keys())
        # Hugging Face has no such buffer.
        if ".moe.expert_bias" not in name
        if not _same(_copy(imported.get(name)), _copy(state.get(name)))
    ]
    exported = {name: _copy(value) for name, value in exported.items()}
    if run.tp == 1 and not report.hugging_face:
        report.hugging_face = _of_all_ranks(exported)
    names = _of_all_ranks(dict.fromkeys(exported))
    report.exported[run.tp] = len(names)
    report.exported_differently += [
        f"TP {run.tp}: {name}"
        for name in names.keys() | report.hugging_face.keys()
        if name not in names or (name in exported and not _same(exported[name], report.hugging_face[name]))
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


if __name__ == "__main__":
    main()
