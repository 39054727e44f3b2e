"""Count how often a step gathers wk and wv, whose heads ranks share: in forward, and again in backward.

    python -m tests.torchtitan.kv_replication.count_gathers llama3:8/2:ac=none

The process poses as a rank of four, whose collectives do nothing.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.models import installed_line
from torchtitan_tp_validate.rehearsal.parallelize import Guards, build, make_parallel_dims, parallelize

WORLD_SIZE = 4
LAYERS = 2


class _Gathers(TorchDispatchMode):  # type: ignore[misc]
    """Counts the gathers of this many numbers."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "all_gather" in func.__name__ or "allgather" in func.__name__:
            whole = torch.utils._pytree.tree_leaves((args, result))
            self.count += max(t.numel() for t in whole if isinstance(t, torch.Tensor)) == self.numbers
        return result


def main(texts: list[str]) -> None:
    """Print, for each case, the gathers of a layer in forward and in backward."""
    line = installed_line()
    line.prepare("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=WORLD_SIZE)
    guards = Guards()
    for text in texts:
        case = Case.parse(text, WORLD_SIZE, guard="install", replicate_kv_heads=True, as_trainer=True)
        guards.before_build(case)
        tiny = build(line, case)
        layer = tiny.model.layers["0"].attention
        weight = getattr(layer, "qkv_linear", layer).wk.weight
        dims = make_parallel_dims(tiny, case)
        model, context, _ = parallelize(tiny, dims, case, torch.device("cpu"))
        tiny.initialize(model, torch.device("cpu"))
        # Main's loss passes one sequence at a time through the model.
        passes: list[Any] = []
        model.register_forward_pre_hook(lambda module, _, passes=passes: passes.append(module))
        tokens = torch.zeros(2, tiny.seq_len, dtype=torch.long)
        with context():
            with _Gathers(weight.numel()) as forward:
                loss = tiny.loss(model, tokens, tokens)
            with _Gathers(weight.numel()) as backward:
                loss.backward()
        layers = LAYERS * len(passes)
        print(json.dumps({text: [forward.count / layers, backward.count / layers]}))


if __name__ == "__main__":
    main(sys.argv[1:])
