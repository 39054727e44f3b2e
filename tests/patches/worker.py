"""One rank of the patched torchtitan alone: twice as many ranks as KV heads are refused, as many train.

    torchrun --nproc-per-node 4 -m tests.patches.worker --out DIR

Writes a report per family to ``DIR/rank{RANK}.json``. Of this package nothing can be imported in here but
what runs it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from torchtitan_tp_validate.rehearsal.models import installed_line
from torchtitan_tp_validate.rehearsal.training import (
    collectives,
    copy_weights,
    join_process_group,
    load_weights,
    named_parameters,
    train,
)

SEED = 20
N_HEADS = 8


def families(line: Any) -> list[str]:
    """Of those that the issue names, the ones that the line has."""
    return [family for family in ("llama3", "llama4", "qwen3_5", "qwen3") if family in line.FAMILIES]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    line = installed_line()
    assert not {"torchtitan_tp_validate.guards", "torchtitan_tp_validate.validate"} & sys.modules.keys()
    sys.modules["torchtitan_tp_validate"] = None  # type: ignore[assignment]  # importing it raises from here on
    device = join_process_group(line)
    reports = []
    try:
        for family in families(line):
            report: dict[str, Any] = {"rank": dist.get_rank(), "family": family}
            reports.append(report)
            _refusals(line, family, report)
            _training(line, family, device, report)
    finally:
        (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(reports), encoding="utf-8")
    dist.destroy_process_group()


def _refusals(line: Any, family: str, report: dict[str, Any]) -> None:
    import torchtitan

    tp = dist.get_world_size()
    report["torchtitan"] = torchtitan.__path__[0]
    heads = {"n_heads": N_HEADS, "n_kv_heads": tp // 2}
    tiny = line.build(family, **heads, tp=tp, upstream_check=False)
    args, kwargs = tiny.arguments(tiny.make_parallel_dims(tp, tp))
    groups, before = dist.distributed_c10d._world.pg_map, sum(collectives())
    n_groups = len(groups)
    try:
        tiny.parallelize_fn(tiny.model, *args, **kwargs)
    except ValueError as error:
        report["refused"] = str(error)
    report["touched"] = [
        sum(collectives()) - before,
        len(groups) - n_groups,
        sum(isinstance(parameter, DTensor) for parameter in tiny.model.parameters()),
    ]
    if line.HAS_HEAD_CHECK:
        try:
            line.build(family, **heads, tp=tp)
        except ValueError as error:
            report["refused_config"] = str(error)


def _training(line: Any, family: str, device: torch.device, report: dict[str, Any]) -> None:
    tp = dist.get_world_size()
    heads = {"n_heads": N_HEADS, "n_kv_heads": tp}

    def enter(stage: str) -> None:
        report["stage"] = stage

    tiny = line.build(family, **heads, tp=tp)
    args, kwargs = tiny.arguments(tiny.make_parallel_dims(tp, tp))
    model = tiny.parallelize_fn(tiny.model, *args, **kwargs)
    tiny.initialize(model, device)

    reference = line.build(family, **heads, tp=1)
    torch.manual_seed(SEED)
    reference.initialize(reference.model, device)
    _tie(reference.model, dict(named_parameters(model)).keys())
    weights = copy_weights(reference.model)
    steps = train(reference, reference.model, device, steps=2, seed=SEED, enter=enter)
    report["reference_losses"] = [step.loss for step in steps]

    load_weights(model, weights)
    steps = train(tiny, model, device, steps=2, seed=SEED, enter=enter)
    report["losses"] = [step.loss for step in steps]
    report["sharded"] = sum(isinstance(parameter, DTensor) for parameter in model.parameters())


def _tie(model: nn.Module, names: Set[str]) -> None:
    """Tie a plain model's embeddings if the parallelized one, with parameters of these names, has them tied.

    torchtitan 0.2.0 and 0.2.1 tie those of qwen3 no sooner than in the parallelize function. The weights
    are then those of the output projection, which is initialized last.
    """
    missing = dict(model.named_parameters()).keys() - names
    if missing:
        assert missing == {"output.weight"}, missing
        model.tok_embeddings.weight = model.output.weight


if __name__ == "__main__":
    main()
