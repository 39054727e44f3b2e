"""Run forward passes with shared key-value heads under spmd_types' type checking, in one process.

    python -m tests.torchtitan.kv_replication.type_checked llama3 qwen3_5

The process poses as a rank of four, whose collectives do nothing: types are checked, values are not.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.distributed.spmd_types import annotate_input_spmd_types
from torchtitan.distributed.utils import get_spmd_context

from tests.torchtitan.installed import RELEASE
from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.models import installed_line
from torchtitan_tp_validate.rehearsal.parallelize import Guards, build

WORLD_SIZE = 4
BATCH = () if RELEASE == "main" else (2,)
"""How many sequences there are; main takes tokens in a row."""


def main(families: list[str]) -> None:
    line = installed_line()
    line.prepare("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=WORLD_SIZE)
    guards = Guards()
    for family in families:
        case = Case.parse(f"{family}:8/2:guard=install", WORLD_SIZE, replicate_kv_heads=True)
        guards.before_build(case)
        tiny = build(line, case)
        dims = tiny.make_parallel_dims(WORLD_SIZE, WORLD_SIZE)
        args, kwargs = tiny.arguments(dims)
        model = tiny.parallelize_fn(tiny.model, *args, **kwargs)
        model.to_empty(device="cpu")
        model.init_states(buffer_device=None)
        tokens = torch.zeros(*BATCH, tiny.seq_len, dtype=torch.long)
        extra = {"positions": torch.arange(tiny.seq_len).repeat(*BATCH, 1)}
        tokens, _, extra = annotate_input_spmd_types(dims, tokens, tokens.clone(), extra)
        if family.startswith("qwen3_5"):
            extra["special_tokens"] = {"image_id": -1, "video_id": -2}
        with get_spmd_context(parallel_dims=dims, spmd_typechecking=True)():
            logits = model(tokens, **extra)
        print(family, tuple(logits.shape))


if __name__ == "__main__":
    main(sys.argv[1:])
