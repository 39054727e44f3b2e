"""Real upstream issues: the run that somebody started, judged before any process group, and one that works.

Each is made small where that changes nothing, and put to the installed line where that has its model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.docs.pages import ROOT
from tests.torchtitan.test_runs import OLD, codes, job

TP, EP = "tensor_parallel_degree", "expert_parallel_degree"
PP, SCHEDULE = "pipeline_parallel_degree", "pipeline_parallel_schedule"
PER_STAGE, MICROBATCH = "pipeline_parallel_layers_per_stage", "pipeline_parallel_microbatch_size"
SHARD, REPLICATE, CP = (
    "data_parallel_shard_degree",
    "data_parallel_replicate_degree",
    "context_parallel_degree",
)

SEQUENCES = "0."
"""The releases: main counts tokens, see `test_main`."""


@dataclass(frozen=True)
class Issue:
    """A run that somebody started.

    Attributes:
        number: of the issue or pull request of pytorch/torchtitan.
        happened: there, in a few words.
        code: of the rule that refuses it.
        run: its fields, see `tests.torchtitan.test_runs.job`.
        works: fields of the run one step away that is not refused for it.
        model: name and flavor.
        ranks: of both.
        line: of torchtitan, or release, that has it; empty for all.
    """

    number: int
    happened: str
    code: str
    run: dict[str, Any]
    works: dict[str, Any]
    model: tuple[str, str] = ("llama3", "debugmodel")
    ranks: int | None = None
    line: str = ""
    more: dict[str, Any] = field(default_factory=dict)


GPT_OSS = ("gpt_oss", "debugmodel")
ISSUES = (
    Issue(27, "the degrees do not make the world", "MESH001", {TP: 4}, {TP: 2}, ranks=6),
    Issue(
        577,
        "replicas beside TP train without gradients",
        "MESH004",
        {SHARD: 1},
        {SHARD: 2},
        ("qwen3", "debugmodel_moe"),
        line="0.2",
        more={REPLICATE: 2, TP: 2},
    ),
    Issue(
        774,
        "ZBV without two stages on each rank",
        "PP002",
        {PER_STAGE: 1},
        {},
        more={PP: 2, SCHEDULE: "ZBVZeroBubble", "batch": 8},
    ),
    Issue(
        775,
        "hangs with fewer microbatches than stages",
        "PP005",
        {"batch": 1},
        {"batch": 2},
        line=SEQUENCES,
        more={PP: 2, SCHEDULE: "1F1B"},
    ),
    Issue(
        784,
        "a batch that microbatches do not divide",
        "PP004",
        {MICROBATCH: 3},
        {MICROBATCH: 2},
        line=SEQUENCES,
        more={PP: 2, "batch": 8},
    ),
    Issue(932, "shape '[1, 8192, -1, 128]' is invalid", "TP002", {TP: 16}, {TP: 8}, ("llama3", "8B")),
    Issue(
        1041,
        "stages that the ranks do not divide",
        "PP001",
        {PER_STAGE: 3},
        {PER_STAGE: 4},
        more={PP: 2, "batch": 8},
    ),
    Issue(
        1238,
        "a global batch that the ranks do not divide",
        "BATCH001",
        {"whole": 40},
        {"whole": 64},
        ranks=4,
        more={"batch": 8},
    ),
    Issue(
        1306,
        "a sequence that TP does not divide",
        "TP009",
        {"seq_len": 2046},
        {"seq_len": 2048},
        line=SEQUENCES,
        more={TP: 4},
    ),
    Issue(
        1416,
        "more stages than layers",
        "PP003",
        {PP: 8},
        {PP: 2},
        more={SCHEDULE: "Interleaved1F1B", "batch": 16},
    ),
    Issue(
        2252, "tied weights under FSDP", "TIE001", {SHARD: 2}, {SHARD: 1}, ("qwen3", "debugmodel"), line="0.2"
    ),
    Issue(
        2323,
        "DDP averages what is divided already",
        "NUM009",
        {SHARD: 1},
        {SHARD: 2},
        line="0.2.2",
        more={REPLICATE: 2},
    ),
    Issue(
        2387,
        "routers differ from rank to rank",
        "NUM001",
        {TP: 2},
        {TP: 1},
        ("deepseek_v3", "debugmodel"),
        line="0.2",
    ),
    Issue(2574, "TP above the number of KV heads", "TP002", {TP: 16}, {TP: 4}, ("llama3", "8B")),
    Issue(
        2972,
        "gradients of a pipeline times its tokens",
        "NUM008",
        {PP: 2},
        {PP: 1},
        line="0.2.2",
        more={"batch": 8},
    ),
    Issue(3395, "a sequence beyond RoPE", "RUN001", {"seq_len": 10_000_000}, {"seq_len": 4096}, line="0.3"),
    Issue(4245, "a bias once per TP rank", "NUM004", {EP: 1}, {EP: 2}, GPT_OSS, line="0.3", more={TP: 2}),
    Issue(
        4258,
        "experts that EP does not divide",
        "EP001",
        {EP: 3, SHARD: 3},
        {EP: 2, SHARD: 2},
        ("deepseek_v3", "debugmodel"),
    ),
    Issue(
        4332,
        "a bias' gradient divided by TP",
        "NUM005",
        {"spmd_backend": "partial_dtensor"},
        {"spmd_backend": "spmd_types", EP: 2},
        GPT_OSS,
        line="0.3",
        more={TP: 2},
    ),
)


def judged(issue: Issue, fields: dict[str, Any]) -> list[str]:
    name, flavor = issue.model
    config = job(name, flavor if OLD else flavor.lower(), **{SHARD: -1, **issue.more, **fields})
    return codes(config, world_size=issue.ranks)


def parameters() -> list[Any]:
    return [
        pytest.param(
            issue,
            id=str(issue.number),
            marks=pytest.mark.requires(torchtitan=issue.line) if issue.line else (),
        )
        for issue in ISSUES
    ]


@pytest.mark.parametrize("issue", parameters())
def test_the_run_is_refused_for_what_happened_and_its_neighbor_is_not(issue: Issue) -> None:
    assert issue.code in judged(issue, issue.run)
    assert issue.code not in judged(issue, issue.works)


def test_the_page_lists_them() -> None:
    page = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
    url = "https://github.com/pytorch/torchtitan/issues"
    rows = [
        f"| [#{issue.number}]({url}/{issue.number}) | {issue.happened} | {issue.code} |" for issue in ISSUES
    ]
    assert "\n".join(rows) in page
