"""What a run starts from, and why it cannot be loaded into it.

Source: ``CheckpointManager.load`` and ``ParallelAwareDataloader.load_state_dict`` of torchtitan 0.2.0 to
main, and ``torch/distributed/checkpoint/default_planner.py``; measured by
tests/rehearsal/test_resumption.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torchtitan_tp_validate.degrees import FLAGS, SHARDS_ARE_UNKNOWN, Degrees

DATA_LOADER = "dataloader"
STATES = ("optimizer", "lr_scheduler", "train_state")
"""What every run saves beside its model and the state of its data loader."""

_MOST_SHOWN = 3


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - _MOST_SHOWN
    return ", ".join(names[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that a run is about to load.

    Attributes:
        path: its folder.
        wanted: what the run loads of it beside the model, of `STATES` and `DATA_LOADER`.
        held: what of these it holds.
        data_ranks: of how many data parallel ranks it has the state of the data loader, 0 where of none.
        missing: the model's weights that it lacks, and those whose optimizer state it does.
        reshaped: the model's weights that are of another shape in it, with both shapes.
        not_judged: the rules that were left out, and why.
    """

    path: str
    wanted: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    data_ranks: int = 0
    missing: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    not_judged: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether it holds what the run loads beside the model and the state of the data loader."""
        return self.held.issuperset(self.wanted - {DATA_LOADER})

    @property
    def _moves_data(self) -> bool:
        return DATA_LOADER in self.wanted and self.data_ranks > 0

    def problems_with_data(self, degrees: Degrees) -> Iterator[tuple[str, str]]:
        """Yield what is wrong, and what to do, where its data loader was of other ranks."""
        ranks = degrees.dp_replicate * degrees.dp_shard
        if self._moves_data and degrees.dp_shard_is_known and ranks != self.data_ranks:
            flags = f"{FLAGS['dp_replicate']} x {FLAGS['dp_shard']}"
            yield (
                f"{self.path} is of {self.data_ranks} data parallel ranks, and the run has {ranks}",
                f"set {flags} to {self.data_ranks}, or begin the data again with "
                f"--checkpoint.exclude_from_loading {DATA_LOADER}",
            )

    def problems_with_states(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong, and what to do, where it lacks what the run resumes from."""
        lacking = [state for state in STATES if state in self.wanted - self.held]
        if lacking:
            yield f"{self.path} holds no {' and no '.join(lacking)}", ""

    def problems_with_weights(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong, and what to do, where it is of another model."""
        lacking = [f"{self.path} lacks {_some(self.missing)}"] if self.missing else []
        resized = [f"in {self.path} {_some(self.reshaped)}"] if self.reshaped else []
        if lacking or resized:
            yield "; ".join((*lacking, *resized)), ""

    def left_out(self, degrees: Degrees) -> tuple[str, ...]:
        """Return the rules about it that were left out, and why."""
        unknown = self._moves_data and not degrees.dp_shard_is_known
        return (*self.not_judged, *([f"CKPT002: {SHARDS_ARE_UNKNOWN}"] if unknown else []))
