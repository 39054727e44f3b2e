"""Start one real job by the launcher, as one rank of a fake process group, and see what is done to it.

    python -m tests.torchtitan.kv_replication.count_judgements --module ... --config ...

Prints as JSON how often its model was judged and converted, by the time that its Trainer starts, that its
model is built, and that it is parallelized; and the walk of ``--replicate-kv-heads`` from the launcher to the
forward of the first gathering linear. The Trainer is cut short: nothing is allocated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch
import torchtitan.train
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.distributed import parallel_dims
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from tests.core.walks import walk
from tests.torchtitan.kv_replication.fake_rank import build, parallelize
from torchtitan_tp_validate import degrees, job, plan, train, validate
from torchtitan_tp_validate.kv_replication import torchtitan_0_3
from torchtitan_tp_validate.kv_replication.linears import KVHeadLinear
from torchtitan_tp_validate.kv_replication.torchtitan_0_3 import ReplicatingConfig
from torchtitan_tp_validate.releases import base, releases
from torchtitan_tp_validate.wrappers import guard

DONE = {"judged": 0, "converted": 0}
SEEN: list[tuple[int, int]] = []


def counted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def count(*args: Any, **kwargs: Any) -> Any:
        DONE[what] += 1
        return function(*args, **kwargs)

    return count


def note() -> None:
    SEEN.append((DONE["judged"], DONE["converted"]))


def start(self: Any, config: Any) -> None:
    """What a Trainer does up to its sharded model."""
    note()
    world_size = config.parallelism.tensor_parallel_degree
    model = build(config, world_size)
    note()
    model = parallelize(config, model, world_size)
    note()
    for linear in [module for module in model.modules() if isinstance(module, KVHeadLinear)][:1]:
        mesh, (_, in_features) = linear.weight.device_mesh, linear.weight.shape
        x = torch.empty(1, 8, in_features, device="meta", dtype=linear.weight.dtype)
        KVHeadLinear.forward(linear, DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim))
    raise SystemExit(0)


def is_asked_for(name: str, value: Any) -> bool:
    """Whether an argument is the flag, or a config or module that was made for it."""
    made = isinstance(value, (ReplicatingConfig, KVHeadLinear, KVHeadLinear.Config))
    return made or (name == "replicate_kv_heads" and value is True)


def launch() -> None:
    with contextlib.suppress(SystemExit):
        train.main()


def main() -> None:
    utils.device_type = parallel_dims.device_type = "cpu"
    Trainer.__init__ = start
    for module in (guard, torchtitan_0_3):
        module.judge = counted("judged", module.judge)
    job.run_error = counted("judged", job.run_error)
    converter = torchtitan_0_3.ReplicateKVHeads
    converter.convert = counted("converted", converter.convert)
    train.runpy.run_module = lambda *args, **kwargs: torchtitan.train.main()  # with what is counted here
    # What a run asks for, and whether it fits, is the first walk.
    asked = (
        *(degrees.degrees_of_job, degrees.degrees_of_call, degrees.training_of_call, degrees.applies_fsdp),
        base.called_function,
    )
    answered = (
        # How it is asked for, and what of the model is split.
        *(job.Options.__init__, plan.Plan.violations, plan.Plan.at),
        *(validate.judge, validate.run_error, validate.raise_if_unread, job.read_plan, job.find_problems),
        *(job.find_faults, job.not_judged, job.is_own, degrees.Degrees.splits_nothing.fget),
        *(line.read_run for line in releases()),
    )
    taken = walk(launch, is_asked_for, without=(*asked, *answered))
    print(json.dumps({"seen": SEEN, **dataclasses.asdict(taken)}), flush=True)


if __name__ == "__main__":
    main()
