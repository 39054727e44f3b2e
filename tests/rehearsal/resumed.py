"""Save checkpoints by torchtitan's Trainer on real ranks, and load them into other runs.

    python -m tests.rehearsal.resumed OUT

``OUT/runs.json`` lists what each run does, its arguments and its number of ranks. It is to ``save``,
``train and save``, ``load``, or ``load and save``, which saves what it loads as the next step. Saved as
``the last``, it is the model alone. It may be ``repaired`` of all known faults, ``adapted`` by LoRA, and
``replicated``: with KV-head replication, and, if it does two things, one key-value head. ``compare`` has two
checkpoints for arguments.
``OUT/outcomes.json`` gets what it raised, or nothing; of two checkpoints, what is the same, and what is not.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torchtitan_tp_validate import repairs
from torchtitan_tp_validate.guards import install
from torchtitan_tp_validate.rehearsal.batches import Batches
from torchtitan_tp_validate.rehearsal.children import Children, die_with_parent
from torchtitan_tp_validate.rehearsal.jobs import Request, installed_line, transformers_backend
from torchtitan_tp_validate.rehearsal.jobs.batch import read_batch
from torchtitan_tp_validate.rehearsal.models import sum_gradients_without_nccl
from torchtitan_tp_validate.rehearsal.truth.layout_runs import give_heads
from torchtitan_tp_validate.releases import kv_replication_of, line_of

VOCAB_SIZE = 2048
"""Of a model of transformers."""


def main(folder: str) -> None:
    """Do what a folder says."""
    die_with_parent()
    out, line = Path(folder), installed_line()
    line.prepare(False)
    runs = json.loads((out / "runs.json").read_text(encoding="utf-8"))
    outcomes = [_outcome(line, *run, out) for run in runs]
    (out / "outcomes.json").write_text(json.dumps(outcomes), encoding="utf-8")


def _outcome(line: ModuleType, what: str, arguments: list[str], ranks: int, out: Path) -> str:
    if what == "compare":
        return _compared(*arguments)
    job = line.parse(Request(tuple(arguments)))
    ends = Children(out, 300.0).run("run", ranks, partial(_rank, line, job, what, out))
    errors = [f"{end.error} {end.traceback}" for end in ends if end.error]
    if not errors and any(end.how != "ended" for end in ends):
        raise AssertionError(f"{what} {arguments}: {ends}")
    return errors[0] if errors else ""


def _rank(line: ModuleType, job: Any, what: str, out: Path, rank: int, enter: Any) -> None:
    enter("building")
    checkpoint = copy.deepcopy(job.checkpoint)
    checkpoint.interval = 1
    checkpoint.last_save_model_only = True
    by_transformers = transformers_backend.is_job(line_of(job).requested_model(job).config)
    if by_transformers:
        # Its sizes are the folder's.
        job.model_spec.model.vocab_size = VOCAB_SIZE
    elif "and save" in what and "replicated" in what:
        give_heads(job, 8, 1)
    if "adapted" in what:
        _adapt(job)
    with _adapter_kept(job):
        line.make_plain(job)
    job.checkpoint = checkpoint
    if "repaired" in what:
        repairs.apply_all()
    if "replicated" in what:
        kv_replication_of(line_of(job)).put_into_job(job)
        # There the guard changes the model that is built; it looks for specs, and a fork has hidden its own.
        if by_transformers or not hasattr(job, "model_spec"):
            gc.unfreeze()
            install(replicate_kv_heads=True, repair="repaired" in what)
    batch = read_batch(job)
    batches = Batches(
        batch.local * 8, batch.seq_len, line.vocab_size(job), seed=1, more=line.more_inputs(job)
    )
    trainer = line.build_trainer(job, batches.of_rank, batch.local, batch.microbatch)
    trainer.checkpointer.states["dataloader"] = _data_loader(trainer.parallel_dims)
    enter(what)
    if what.startswith("train"):
        for part in trainer.model_parts:
            sum_gradients_without_nccl(part)
        trainer.step = 1
        trainer.train_step(trainer.batch_generator(trainer.dataloader))
    if what.startswith("load"):
        assert trainer.checkpointer.load(-1)
        trainer.step += 1
    if "save" in what:
        trainer.checkpointer.save(max(trainer.step, 1), last_step="the last" in what)
    (out / f"run-rank{rank}.json").write_text("{}", encoding="utf-8")


def _compared(*folders: str) -> str:
    """Return how many tensors two checkpoints both have, bit for bit, and the names of all others."""
    import torch

    one, other = map(_tensors, folders)
    shared = one.keys() & other.keys()
    same = {name for name in shared if torch.equal(one[name], other[name])}
    return f"{len(same)} the same, others: {sorted((one.keys() | other.keys()) - same)}"


def _tensors(folder: str) -> dict[str, Any]:
    """Return the tensors of a checkpoint of DCP, or of Hugging Face's files, by their names."""
    import torch
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    files = sorted(Path(folder).glob("*.safetensors"))
    if files:
        return {name: value for file in files for name, value in load_file(file).items()}
    whole = Path(folder, "whole.pt")
    dcp_to_torch_save(folder, whole)
    pairs, _ = torch.utils._pytree.tree_flatten_with_path(torch.load(whole, weights_only=False))
    return {str(name): value for name, value in pairs if torch.is_tensor(value)}


def _adapt(job: Any) -> None:
    """Give every linear of a model of 0.3.x an adapter."""
    from torchtitan.components.lora import LoRAConverter

    job.model_spec.model = LoRAConverter.Config(rank=4).build().convert(job.model_spec.model)


@contextmanager
def _adapter_kept(job: Any) -> Iterator[None]:
    """Keep the names of Hugging Face for a model of 0.2.x, which does without when nothing is loaded."""
    if hasattr(job, "model_spec"):
        yield
        return
    from torchtitan.protocols.train_spec import get_train_spec

    adapter = get_train_spec(job.model.name).state_dict_adapter
    yield
    get_train_spec(job.model.name).state_dict_adapter = adapter


def _data_loader(parallel_dims: Any) -> Any:
    """Return a data loader of torchtitan's own, of this data rank, without any data."""
    from torch.utils.data import IterableDataset
    from torchtitan.components.dataloader import ParallelAwareDataloader

    class Nothing(IterableDataset):
        def __iter__(self) -> Any:
            return iter(())

    if hasattr(parallel_dims, "world_mesh") and not hasattr(parallel_dims, "get_optional_mesh"):  # 0.2.0
        mesh = parallel_dims.world_mesh["dp"] if parallel_dims.dp_enabled else None
    else:
        mesh = parallel_dims.get_optional_mesh("batch")
    ranks, rank = (mesh.size(), mesh.get_local_rank()) if mesh is not None else (1, 0)
    return ParallelAwareDataloader(Nothing(), rank, ranks, batch_size=None)


if __name__ == "__main__":
    main(sys.argv[1])
