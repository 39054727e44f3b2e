"""Lets the stages of a pipeline tell one another their shapes where ranks exchange nothing.

Before its first step torch has each stage go forward and backward once, and send its neighbors the shapes,
types and placements of what it makes, as objects. Among fake ranks nothing is sent. Where the first rank of
every stage is followed, each in a process of its own, these objects go by the store at which the processes
meet, and torch does the rest.

Source: ``torch/distributed/pipelining/stage.py``, ``schedules.py`` of torch 2.13 and 2.15.
"""

from __future__ import annotations

import os
import pickle
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace
from typing import Any


def exchange_shapes(rank: int, patience: float) -> None:
    """Have what a stage tells another go by the store of `children.Children`.

    Args:
        rank: of this process among all the fake ones.
        patience: seconds that a stage waits for another.
    """
    import torch.distributed as dist
    from torch.distributed.pipelining import schedules

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, timeout=timedelta(seconds=patience))
    told: Counter[tuple[int, int]] = Counter()

    def name(source: int, target: int) -> str:
        told[source, target] += 1
        return f"stages/{source}/{target}/{told[source, target]}"

    def send_object_list(objects: list[Any], dst: int, *_: Any, **__: Any) -> None:
        store.set(name(rank, dst), pickle.dumps(objects))

    def recv_object_list(objects: list[Any], src: int, *_: Any, **__: Any) -> None:
        objects[:] = pickle.loads(store.get(name(src, rank)))

    def infer(_: Any, stages: list[Any], *__: Any) -> None:
        for stage in stages:
            stage._inference_mode = schedules.InferenceMode.DYNAMIC

    def batch_p2p(ops: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        return [SimpleNamespace(wait=work.wait, ops=ops) for work in batch(ops, *args, **kwargs)]

    dist.send_object_list, dist.recv_object_list = send_object_list, recv_object_list
    # Real works keep what they send until somebody waits for them.
    batch, schedules._batch_p2p = schedules._batch_p2p, batch_p2p
    # Whether stages have to tell one another is put to the vote; among fake ranks torch 2.15 refuses to. An
    # older one has no vote.
    for vote in ("_warmup_p2p", "_initialize_pipeline_distributed_state"):
        if hasattr(schedules._PipelineSchedule, vote):
            setattr(schedules._PipelineSchedule, vote, infer)
