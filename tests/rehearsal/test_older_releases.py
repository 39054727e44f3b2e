"""What torchtitan 0.2.0 and 0.2.1 run otherwise than 0.2.2: ties, experts, pipelines, context parallelism."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.forked import in_forks, run_script
from tests.rehearsal import warm
from tests.torchtitan.installed import RELEASE
from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal.told import whole_text
from torchtitan_tp_validate.rehearsal.truth.explained import AGREES, count_kinds, explain
from torchtitan_tp_validate.rehearsal.truth.layouts import is_of, layouts, read_rows

pytestmark = [
    pytest.mark.requires(torchtitan=("0.2.0", "0.2.1")),
    pytest.mark.xdist_group("older releases"),
]

ROOT = Path(__file__).resolve().parents[2]
REPLICAS = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}
SHARDS = {"data_parallel_shard_degree": 2}


def run_of(name: str, degrees: dict[str, int], **more: Any) -> dict[str, Any]:
    model, flavor = name.split()
    return {"model": model, "flavor": flavor, "degrees": degrees, **more}


RUNS = {
    "tied": run_of("qwen3 0.6B", REPLICAS),
    "tied repaired": run_of("qwen3 0.6B", REPLICAS, repair=True),
    "tied under TP": run_of("qwen3 0.6B", {"tensor_parallel_degree": 2, "data_parallel_shard_degree": 1}),
    "tied under FSDP": run_of("qwen3 0.6B", SHARDS),
    "experts on one rank each": run_of("deepseek_v3 debugmodel", SHARDS | {"expert_parallel_degree": 2}),
    "experts in stages": run_of(
        "deepseek_v3 debugmodel", {"pipeline_parallel_degree": 2, "data_parallel_shard_degree": 1}
    ),
    "context": run_of("llama3 debugmodel", {"context_parallel_degree": 2}),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what came of each run."""
    folder = tmp_path_factory.mktemp("older")
    warm.rehearse_all(RUNS, folder)
    return folder


def test_a_tie_that_nothing_shards_is_lost_refused_and_repaired(out: Path) -> None:
    stock = warm.found(out, "tied")
    assert stock.outcome == "differs"
    assert ("trainable", "output.weight") in {(one.what, one.name) for one in stock.differences}
    assert "NUM016" in stock.verdict
    repaired = warm.found(out, "tied repaired")
    assert (repaired.outcome, repaired.verdict) == ("equal", "fits"), whole_text(repaired)


@pytest.mark.parametrize(
    "name", ["tied under TP", "tied under FSDP", "experts on one rank each", "experts in stages"]
)
def test_what_is_let_through_trains_what_one_process_trains(out: Path, name: str) -> None:
    seen = warm.found(out, name)
    assert (seen.outcome, seen.verdict) == ("equal", "fits"), whole_text(seen)


TABLE = ROOT / "tests" / "truth" / f"layouts-{RELEASE}.csv"


def test_every_recorded_layout_agrees() -> None:
    rows = read_rows(TABLE)
    assert {row.layout for row in rows} >= {one for one in layouts("0.2") if is_of(RELEASE, one)}
    why = [explain("0.2", row) for row in rows]
    assert {*why} == {AGREES}
    with TABLE.open(encoding="utf-8", newline="") as stream:
        assert [values["explanation"] for values in csv.DictReader(stream)] == why
    counted = f"| layouts of {RELEASE} | {len(rows)} | {' | '.join(map(str, count_kinds('0.2', rows)))} |"
    assert counted in (ROOT / "docs" / "truth.md").read_text(encoding="utf-8"), counted


@in_forks
def test_the_rules_say_of_every_layout_what_is_recorded(tmp_path: Path) -> None:
    shutil.copy(TABLE, tmp_path)
    run_script("truth_layouts", "--judge", "--out", str(tmp_path), out=tmp_path / "ended")
    assert (tmp_path / TABLE.name).read_text() == TABLE.read_text()


def test_what_a_cpu_cannot_run_is_told(out: Path) -> None:
    with pytest.raises(RehearsalError) as caught:
        warm.found(out, "context")
    assert str(caught.value) == (
        "context parallelism of this release needs the attention kernels of a GPU: to rehearse the rest, "
        "set context_parallel_degree to 1."
    )
