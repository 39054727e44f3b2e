"""Let torchtitan's own Trainer run on the CPU.

torchtitan asks for an accelerator as its modules are imported, and takes it to be CUDA when there is none
(``torchtitan.tools.utils.get_device_info``, 0.2.0 to 0.3.0). Told that the CPU is one, it needs of the
device's module no more than is here.
"""

from __future__ import annotations

import gc
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any


def choose_cpu(compile: bool) -> None:
    """Make the CPU torchtitan's device. To be called before anything of it is imported.

    Unless it is to be compiled, what torch would compile runs as it is written: that takes less long.
    """
    # What is imported stays: looking for garbage in it takes longer each time. The Trainer does the same.
    gc.disable()
    import torch

    assert "torchtitan.tools.utils" not in sys.modules, "torchtitan has chosen its device already"
    device = _cpu_module()
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda _: device
    if not compile:
        torch.compiler.set_stance("force_eager")
    # torchtitan does the same in init_distributed: its current mesh is thread-local.
    torch.autograd.set_multithreading_enabled(False)
    _send_as_nccl_does()


def join_fake_ranks(job: Any, rank: int, world_size: int) -> None:
    """Have the Trainer of this process set a rank up among others that are not there."""
    import torch.distributed as dist
    from torchtitan.distributed import utils

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")

    def init_distributed(*_: Any, **__: Any) -> int:
        dist.init_process_group("fake", rank=rank, world_size=world_size)
        return world_size

    utils.init_distributed = init_distributed
    # What ranks agree on by collectives, they do not with a fake group.
    job.debug.seed = 1


def _send_as_nccl_does() -> None:
    """Let stages of a pipeline send dense memory of any order of dims, as NCCL does and gloo does not.

    What a stage computes under sequence parallelism has the sequence outermost, and its receiver knows.
    """
    from torch.distributed.pipelining import schedules

    batch_p2p = schedules._batch_p2p

    def batch_p2p_as_stored(ops: Any, *args: Any, **kwargs: Any) -> Any:
        for op in ops:
            if not op.tensor.is_contiguous():
                dims = sorted(range(op.tensor.dim()), key=op.tensor.stride, reverse=True)
                op.tensor = op.tensor.detach().permute(dims)
        return batch_p2p(ops, *args, **kwargs)

    schedules._batch_p2p = batch_p2p_as_stored


def _cpu_module() -> Any:
    module: Any = ModuleType("cpu")
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(module, name, lambda *_: None)
    module.is_available = lambda: True
    module.current_device = lambda: 0
    module.device_count = lambda: 1
    module.get_device_name = lambda *_: "CPU"
    module.get_device_properties = lambda *_: SimpleNamespace(total_memory=2**30)
    module.memory_stats = lambda *_: {}
    return module
