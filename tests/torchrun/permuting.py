"""A rank of `test_hugging_face_weights`: ``python -m tests.torchrun.permuting FOLDER FSDP:TP:HEADS...``.

A weight of so many heads, split as torchtitan splits it, is saved and loaded as Hugging Face's by the
functions that its Llama 3 adapter permutes rows with: as they are, and repaired.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from tests.torchrun.ending import end_rank
from torchtitan_tp_validate import repairs

HEAD_DIM, DIM = 16, 64


def adapter() -> Any:
    """Return Llama 3's adapter of the installed torchtitan, without a model."""
    package = "torchtitan.models.llama3"
    name = f"{package}.state_dict_adapter"
    module = importlib.import_module(name if find_spec(name) else f"{package}.model.state_dict_adapter")
    kind = module.Llama3StateDictAdapter
    return kind.__new__(kind)


def split(weight: torch.Tensor, fsdp: int, tp: int) -> nn.Module:
    """Return a module with this weight, split over TP, then over FSDP."""
    mesh = init_device_mesh("cpu", (fsdp, tp), mesh_dim_names=("fsdp", "tp"))
    linear = nn.Linear(DIM, weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone())
    if tp > 1:
        parallelize_module(linear, mesh["tp"], ColwiseParallel())
    return fully_shard(nn.Sequential(linear), mesh=mesh["fsdp"])


@torch.no_grad()
def exchange(folder: Path, fsdp: int, tp: int, heads: int) -> bool:
    """Whether what is saved is the whole weight permuted, and what is loaded the weight again."""
    torch.manual_seed(heads)
    permuting, rows = adapter(), heads * HEAD_DIM
    weight = torch.randn(rows, DIM)
    key, sizes = "0.weight", (heads, rows, DIM)
    saved = {"k_proj": permuting._permute(split(weight, fsdp, tp).state_dict()[key], *sizes)}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
    dcp.save(saved, storage_writer=writer)
    (file,) = folder.glob("*.safetensors")
    is_permuted = torch.equal(load_file(file)["k_proj"], permuting._permute(weight, *sizes))

    model = split(torch.zeros_like(weight), fsdp, tp)
    wanted = {"k_proj": permuting._permute(model.state_dict()[key], *sizes)}
    dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)))
    model.load_state_dict({key: permuting._reverse_permute(wanted["k_proj"], *sizes)})
    return is_permuted and torch.equal(model.state_dict()[key].full_tensor(), weight)


def outcome(folder: Path, layout: str) -> str:
    """Return ``right``, ``wrong``, or what was raised."""
    try:
        return "right" if exchange(folder, *map(int, layout.split(":"))) else "wrong"
    except (Exception, CheckpointException) as error:  # the second is no Exception
        return f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"


def main(out: Path, layouts: Sequence[str]) -> None:
    """Say what comes of every layout, as it is and repaired."""
    dist.init_process_group("gloo")
    for state in ("stock", "repaired"):
        if state == "repaired":
            repairs.apply(["CKPT001"])
        for number, layout in enumerate(layouts):
            seen = outcome(out / f"{state}{number}", layout)
            # In one piece: the ranks share a stream.
            print(f"rank {dist.get_rank()}: {state} {layout} {seen}\n", end="", flush=True)
            dist.barrier()
    end_rank()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
