"""Start one real job by the launcher, as one rank of a fake process group, and count what is done to it.

    python -m tests.torchtitan.kv_replication.count_judgements --module ... --config ...

Prints as JSON how often its model was judged and converted, by the time that its Trainer starts, that its
model is built, and that it is parallelized. The Trainer is cut short: nothing is allocated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.train
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from torchtitan_tp_validate import job, train
from torchtitan_tp_validate.kv_replication import torchtitan_0_3
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
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    set_spmd_backend(config.parallelism.spmd_backend)
    spec = config.model_spec
    spec.model.update_from_config(config=config)
    with torch.device("meta"):
        model = spec.model.build()
    note()
    spec.parallelize_fn(
        model,
        parallel_dims=ParallelDims.from_config(config.parallelism, world_size),
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=None,
        dump_folder="",
    )
    note()
    print(json.dumps(SEEN), flush=True)
    raise SystemExit(0)


def main() -> None:
    utils.device_type = parallel_dims.device_type = "cpu"
    Trainer.__init__ = start
    for module in (job, guard, torchtitan_0_3):
        module.judge = counted("judged", module.judge)
    converter = torchtitan_0_3.ReplicateKVHeads
    converter.convert = counted("converted", converter.convert)
    train.runpy.run_module = lambda *args, **kwargs: torchtitan.train.main()  # with what is counted here
    train.main()


if __name__ == "__main__":
    sys.exit(main())
