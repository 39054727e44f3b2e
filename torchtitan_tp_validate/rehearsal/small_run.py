"""A small job at one batch size: run in one process, then on all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal.children import Children, End
from torchtitan_tp_validate.rehearsal.jobs import ignored_label, save_every, split, validation_of
from torchtitan_tp_validate.rehearsal.jobs.batch import read_batch
from torchtitan_tp_validate.rehearsal.world import World
from torchtitan_tp_validate.releases import line_of

if TYPE_CHECKING:
    from torchtitan_tp_validate.rehearsal.batches import Batches

_OF_ONE_PROCESS = {"NUM016"}
"""Faults that one process has and its ranks may not: it is repaired of them, for the comparison."""

_VALIDATION_STEPS = 2
"""Batches of a validation: more than one, so that it takes the mean of their losses."""


@dataclass
class SmallRun:
    """A small job at one batch size.

    Attributes:
        line: the module of `jobs` that the job is of.
        job: split over ``world``, and small.
        microbatch_size: sequences that each data rank computes at a time.
        out: the folder of the rehearsal.
        used: the stand-ins that this process has called.
        keep: leave every rank's gradients in the folder.
        outputs: compare what modules compute.
        repairs: codes of the known faults that are repaired.
        accumulates: local batches whose gradients are summed in a step.
        checkpoint: how the job saves its checkpoints, if it does: it is resumed from one then.
        validates: validate between the steps.
    """

    line: ModuleType
    job: Any
    world: World
    microbatch_size: int
    out: Path
    used: set[str]
    keep: bool = False
    outputs: bool = True
    repairs: tuple[str, ...] = ()
    accumulates: int = 1
    checkpoint: Any = None
    validates: bool = False

    def run_reference(self, children: Children) -> None:
        """Run in one process, on the rows of all data ranks.

        Raises:
            RehearsalError: it does not end.
        """
        (end,) = children.run("reference", 1, self._reference)
        if end.how != "ended":
            raise RehearsalError(f"one process {_told(end)}", end.traceback)

    def take_reference(self, folder: Path) -> None:
        """Take what was run in one process for another run, which has the same rows."""
        for name in ("reference.pt", "reference-rank0.json"):
            (self.out / name).hardlink_to(folder / name)

    def run_ranks(self, children: Children) -> dict[str, Any]:
        """Run on all ranks; return what each saw, as JSON data, beside the reference."""
        return self._seen_by_ranks("rehearsal", children, self._rank)

    def resume_ranks(self, children: Children) -> dict[str, Any]:
        """Run on all ranks again, from the checkpoint that they have left; return the same."""
        return self._seen_by_ranks("resumption", children, self._resumed_rank)

    def _seen_by_ranks(
        self, name: str, children: Children, run: Callable[[int, Callable[[str], None]], None]
    ) -> dict[str, Any]:
        ends = children.run(name, self.world.ranks, run)
        return {
            "local_batch_size": self._local_batch_size,
            "resumed": name == "resumption",
            "labels": self._batches.labels,
            "ends": [asdict(end) for end in ends],
            "records": [_record(self.out / f"{name}-rank{rank}.json") for rank in range(len(ends))],
            "reference": _record(self.out / "reference-rank0.json"),
        }

    def build_trainer(self, feed: Callable[..., Any], local_batch_size: int, microbatch_size: int) -> Any:
        """Return the Trainer, in a process of the run."""
        trainer = self.line.build_trainer(
            self.job, feed, local_batch_size, microbatch_size, global_batch_size=self._rows
        )
        if self.job.compile.enable:
            _count_tokens_once(trainer.model_parts)
        return trainer

    @property
    def _local_batch_size(self) -> int:
        return self.microbatch_size * self.world.microbatches

    @property
    def _rows(self) -> int:
        return self._local_batch_size * self._data_ranks * self.accumulates

    @property
    def _data_ranks(self) -> int:
        return self.world.degrees.dp_shard * self.world.degrees.dp_replicate

    @property
    def _batches(self) -> Batches:
        from torchtitan_tp_validate.rehearsal.batches import Batches

        line, job = self.line, self.job
        return Batches(
            self._rows,
            read_batch(job).seq_len,
            line.vocab_size(job),
            seed=1,
            more=line.more_inputs(job),
            ignored=ignored_label(),
        )

    def _repair(self, name: str) -> None:
        from torchtitan_tp_validate import repairs
        from torchtitan_tp_validate.releases.sources import installed_faults

        sources = line_of(self.job).FAULT_SOURCES
        alone = installed_faults(sources, _OF_ONE_PROCESS & sources.keys()) if name == "reference" else ()
        if codes := {*self.repairs, *alone}:
            repairs.apply(sorted(codes))

    def _reference(self, rank: int, enter: Callable[[str], None]) -> None:
        split(self.job, None)
        self._run("reference", rank, enter, self._rows)

    def _rank(self, rank: int, enter: Callable[[str], None]) -> None:
        self._run("rehearsal", rank, enter, self._local_batch_size)

    def _resumed_rank(self, rank: int, enter: Callable[[str], None]) -> None:
        self._run("resumption", rank, enter, self._local_batch_size)

    def _run(self, name: str, rank: int, enter: Callable[[str], None], local_batch_size: int) -> None:
        from torchtitan_tp_validate.rehearsal.process import STEPS, Process, write_json

        enter("starting")
        self._repair(name)
        batches = self._batches
        if self.checkpoint is not None and name != "reference":
            self.job.checkpoint = save_every(STEPS, self.checkpoint, self.out / "checkpoint")
        if self.validates and name != "resumption":
            validation = validation_of(self.job)
            validation.enable, validation.steps = True, _VALIDATION_STEPS
        if name == "resumption":
            batches = replace(batches, passed=STEPS)
        # The stages of a pipeline find the shapes of their inputs by a forward pass of nothing, and what is
        # compiled takes no hooks.
        outputs = self.outputs and self.world.pp == 1 and not self.job.compile.enable
        process = Process(
            *(self.out, enter),
            keep=self.keep,
            outputs=outputs,
            resumes=self.checkpoint is not None,
            validates=self.validates and name != "resumption",
        )
        run = {
            "reference": process.reference,
            "rehearsal": process.rank,
            "resumption": process.resumed_rank,
        }[name]
        run(partial(self.build_trainer, batches.of_rank, local_batch_size, self.microbatch_size))
        process.record.stand_ins = sorted(self.used)
        write_json(self.out / f"{name}-rank{rank}.json", asdict(process.record))


def _count_tokens_once(parts: Iterable[Any]) -> None:
    """Let torchtitan balance experts by the tokens that were counted.

    It halves them under activation checkpointing, which counts them again as it recomputes; what is compiled
    does not. Rounded down, the halves of what each rank has counted are not the half of the whole: an expert
    that has its share is then biased on ranks, and not in one process.
    Source: ``components/optimizer/optimizer.py`` of torchtitan 0.3.0 (_update_expert_bias).
    """
    for part in parts:
        for module in part.modules():
            if hasattr(module, "checkpoint_impl"):
                module.checkpoint_impl = None


def _record(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _told(end: End) -> str:
    return f"{end.how} while {end.stage}{f': {end.error}' if end.error else ''}"
