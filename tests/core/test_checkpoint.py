"""Why a run cannot go on from a checkpoint, in full."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.test_layout import run
from torchtitan_tp_validate.checkpoint import DATA_LOADER, STATES, Checkpoint
from torchtitan_tp_validate.degrees import SHARDS_ARE_UNKNOWN, Degrees
from torchtitan_tp_validate.layout import find_problems
from torchtitan_tp_validate.validate import run_error

ALL = frozenset((DATA_LOADER, *STATES))


def checkpoint(**fields: Any) -> Checkpoint:
    return Checkpoint("step-10", **{"wanted": ALL, "held": ALL, "data_ranks": 2, **fields})


DATA = """\
This run cannot work: step-10 is of 2 data parallel ranks, and the run has 8.

  CKPT002 step-10 is of 2 data parallel ranks, and the run has 8:
        a run that resumes has as many data parallel ranks as the one that wrote its checkpoint.

Without this check: every data rank has a state of its own in it: with fewer ranks torchtitan stops
  with "dp_degree is inconsistent before and after checkpoint" (main:
  "cannot resume after changing the effective data-parallel degree"), with more torch with
  "Missing key in checkpoint state_dict: dataloader.dp_rank_...", when the process groups are up.
To change it: set data_parallel_replicate_degree x data_parallel_shard_degree to 2, or begin the data
  again with --checkpoint.exclude_from_loading dataloader."""

ALONE = """\
This run cannot work: step-10 holds no optimizer and no train_state.

  CKPT003 step-10 holds no optimizer and no train_state:
        what a run resumes from holds its optimizer, learning rate scheduler and step, too.

Without this check: the last checkpoint of a run is of the model alone, unless
  checkpoint.last_save_model_only is false: torch does not find the others in it, when the process
  groups are up.
To change it: resume from an earlier step (--checkpoint.load_step), or begin a run from these weights
  (--checkpoint.initial_load_path) with another --checkpoint.folder."""

OTHER = """\
This run cannot work: step-10 lacks a, b, c and 2 more; in step-10 wq is (8, 4), not (4, 4).

  CKPT004 step-10 lacks a, b, c and 2 more; in step-10 wq is (8, 4), not (4, 4):
        a checkpoint holds every weight of the model, and of the same size.

Without this check: torch stops with "Missing key in checkpoint state_dict", "Size mismatch" or
  "metadata is None", when the process groups are up.
To change it: load a checkpoint of this model, or run the model of the checkpoint: with the flavor, the
  converters and the KV-head replication that it was trained with."""


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (checkpoint(), DATA),
        (checkpoint(data_ranks=0, held=frozenset({"lr_scheduler"})), ALONE),
        (checkpoint(data_ranks=0, missing=tuple("abcde"), reshaped=("wq is (8, 4), not (4, 4)",)), OTHER),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told_in_full(found: Checkpoint, text: str) -> None:
    stopped = run(dp_replicate=2, dp_shard=4, checkpoint=found)
    assert str(run_error(None, stopped.degrees, find_problems(stopped))) == text


def test_the_state_of_the_data_is_not_judged_with_ranks_that_are_not_known() -> None:
    left = Degrees(tp=2, dp_shard_is_known=False)
    assert checkpoint().left_out(left) == (f"CKPT002: {SHARDS_ARE_UNKNOWN}",)
    assert not find_problems(run(dp_shard_is_known=False, checkpoint=checkpoint()))
    assert checkpoint(wanted=frozenset(STATES)).left_out(left) == ()
    assert checkpoint(data_ranks=0).left_out(left) == ()
    assert checkpoint(not_judged=("why",)).left_out(Degrees(tp=1)) == ("why",)
