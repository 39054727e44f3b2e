"""Real upstream issues: the run that somebody started, judged before any process group, and one that works.

Each is made small where that changes nothing, and put to the installed line where that has its model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.docs.pages import ROOT
from tests.torchtitan.test_runs import OLD, job, refusal_of

TP, EP = "tensor_parallel_degree", "expert_parallel_degree"
PP, SCHEDULE = "pipeline_parallel_degree", "pipeline_parallel_schedule"
PER_STAGE, MICROBATCH = "pipeline_parallel_layers_per_stage", "pipeline_parallel_microbatch_size"
FIRST_LESS = "pipeline_parallel_first_stage_less_layers"
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
        words: of the refusal, which say what is wrong with which values.
        run: its fields, see `tests.torchtitan.test_runs.job`.
        works: fields of the run one step away that is not refused for it.
        model: name and flavor.
        ranks: of both.
        line: of torchtitan, or releases, that have it; empty for all.
        more: fields of both.
        config_name: of 0.3.x, where it is not made of the model's and the flavor's.
    """

    number: int
    happened: str
    code: str
    words: str
    run: dict[str, Any]
    works: dict[str, Any]
    model: tuple[str, str] = ("llama3", "debugmodel")
    ranks: int | None = None
    line: str | tuple[str, ...] = ""
    more: dict[str, Any] = field(default_factory=dict)
    config_name: str = ""


GPT_OSS, DEEPSEEK = ("gpt_oss", "debugmodel"), ("deepseek_v3", "debugmodel")
ISSUES = (
    Issue(
        27,
        "the degrees do not make the world",
        "MESH001",
        "tensor_parallel_degree (4) is not the number of ranks (6)",
        {TP: 4},
        {TP: 2},
        ranks=6,
    ),
    Issue(
        568,
        "a schedule of one stage for a rank that has two",
        "PP002",
        "by pipeline_parallel_layers_per_stage (2) make 4 stages, 2 on each rank, and 1F1B wants 1",
        {SCHEDULE: "1F1B"},
        {SCHEDULE: "Interleaved1F1B"},
        more={PP: 2, PER_STAGE: 2, "batch": 8},
    ),
    Issue(
        577,
        "replicas beside TP train without gradients",
        "MESH004",
        "data_parallel_replicate_degree (2) stands beside tensor_parallel_degree (2)",
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
        "make 8 stages, 4 on each rank, and ZBVZeroBubble wants 2",
        {PER_STAGE: 1},
        {},
        more={PP: 2, SCHEDULE: "ZBVZeroBubble", "batch": 8},
    ),
    Issue(
        775,
        "hangs with fewer microbatches than stages",
        "PP005",
        "= 1 microbatches are fewer than the 2 stages, and 1F1B wants one for each",
        {"batch": 1},
        {"batch": 2},
        line=SEQUENCES,
        more={PP: 2, SCHEDULE: "1F1B"},
    ),
    Issue(
        784,
        "a batch that microbatches do not divide",
        "PP004",
        "pipeline_parallel_microbatch_size (3) does not divide local_batch_size (8)",
        {MICROBATCH: 3},
        {MICROBATCH: 2},
        line=SEQUENCES,
        more={PP: 2, "batch": 8},
    ),
    Issue(
        932,
        "shape '[1, 8192, -1, 128]' is invalid",
        "TP002",
        "n_kv_heads = 8 is not a multiple of 16",
        {TP: 16},
        {TP: 8},
        ("llama3", "8B"),
    ),
    Issue(
        1041,
        "stages that the ranks do not divide",
        "PP001",
        "make 3 stages, which pipeline_parallel_degree (2) does not divide",
        {PER_STAGE: 3},
        {PER_STAGE: 4},
        more={PP: 2, "batch": 8},
    ),
    Issue(
        1103,
        "an embedding that weighs more than a stage",
        "PP003",
        "pipeline_parallel_first_stage_less_layers (4) is more than the 2 of 6 layers + 4 + 1 that",
        {FIRST_LESS: 4},
        {FIRST_LESS: 2},
        more={PP: 4, SCHEDULE: "1F1B", "batch": 8},
    ),
    Issue(
        1238,
        "a global batch that the ranks do not divide",
        "BATCH001",
        " x 4 data parallel ranks = ",
        {"whole": 40},
        {"whole": 64},
        ranks=4,
        more={"batch": 8},
    ),
    Issue(
        1306,
        "a sequence that TP does not divide",
        "TP009",
        "seq_len = 2046 is not a multiple of ",
        {"seq_len": 2046},
        {"seq_len": 2048},
        line=SEQUENCES,
        more={TP: 4},
    ),
    Issue(
        1416,
        "more stages than layers",
        "PP003",
        "16 stages are more than 6 layers + 1 + 1",
        {PP: 8},
        {PP: 2},
        more={SCHEDULE: "Interleaved1F1B", "batch": 16},
    ),
    Issue(
        1482,
        "EP is no factor of the world size",
        "MESH002",
        "expert_parallel_degree (4) does not divide the 2 ranks that data_parallel_shard_degree (2) make",
        {EP: 4},
        {EP: 2},
        DEEPSEEK,
        ranks=2,
        more={SHARD: 2},
    ),
    Issue(
        1524,
        "tied weights in a pipeline",
        "RUN001",
        "torchtitan itself refuses this run: Weight tying is not supported with Pipeline Parallel",
        {PP: 2},
        {PP: 1},
        ("qwen3", "debugmodel"),
        line="0.3",
        more={"batch": 8},
    ),
    Issue(
        1561,
        "FSDP cuts a hidden size of experts",
        "FSDP001",
        "Data parallel shard degree (96) does not fit expert_hidden_dim (256)",
        {SHARD: 96},
        {SHARD: 8},
        DEEPSEEK,
        line=SEQUENCES,
        more={EP: 2},
    ),
    Issue(
        1721,
        "DualPipeV and EP recompute activations",
        "PP009",
        "DualPipeV has expert_parallel_degree 2 and activation checkpointing",
        {SCHEDULE: "DualPipeV"},
        {SCHEDULE: "ZBVZeroBubble"},
        DEEPSEEK,
        line=("0.2.1", "0.2.2"),
        more={PP: 2, EP: 2, SHARD: 2, "batch": 8},
    ),
    Issue(
        1805,
        "the router's gate learns from one TP rank",
        "NUM002",
        "torchtitan trains this model wrong at tensor_parallel_degree 2, expert_parallel_degree 2",
        {TP: 2},
        {TP: 1},
        ("llama4", "debugmodel"),
        line="0.2",
        more={EP: 2, SHARD: 2},
    ),
    Issue(
        2011,
        "async TP of a model that is not compiled",
        "RUN002",
        "torchtitan's parallelize function refuses this run: Async TP requires ",
        {"enable_async_tensor_parallel": True},
        {"enable_async_tensor_parallel": False},
        line="0.2",
        more={TP: 2},
    ),
    Issue(
        2077,
        "qwen3's positions stay whole under CP",
        "CP004",
        "context_parallel_degree is 2, and the ",
        {CP: 2},
        {CP: 1},
        ("qwen3", "8B"),
        line=("0.2.0", "0.2.1"),
    ),
    Issue(
        2087,
        "the ranks that EP is made of",
        "MESH002",
        "expert_parallel_degree (16) does not divide the 8 ranks that data_parallel_shard_degree (2) x "
        "context_parallel_degree (2) x tensor_parallel_degree (2) make",
        {EP: 16},
        {EP: 8},
        DEEPSEEK,
        ranks=8,
        more={SHARD: 2, CP: 2, TP: 2},
    ),
    Issue(
        2184,
        "llama4 with EP asks for a mesh of TP",
        "RUN002",
        "torchtitan's parallelize function refuses this run: Mesh 'tp' is not available.",
        {EP: 2},
        {EP: 1},
        ("llama4", "debugmodel"),
        ranks=2,
        line="0.2.1",
        more={SHARD: 2},
    ),
    Issue(
        2252,
        "tied weights that come apart",
        "NUM016",
        "the model's embedding and output are tied, and nothing shards them",
        {SHARD: 1},
        {SHARD: 2},
        ("qwen3", "debugmodel"),
        line=("0.2.0", "0.2.1"),
    ),
    Issue(
        2318,
        "a gradient norm that replicas divide",
        "NUM009",
        "the installed torchtitan trains this model wrong at data_parallel_replicate_degree 8",
        {REPLICATE: 8},
        {REPLICATE: 1},
        ranks=8,
        line="0.2.2",
    ),
    Issue(
        2323,
        "DDP averages what is divided already",
        "NUM009",
        "the installed torchtitan trains this model wrong at data_parallel_replicate_degree 2",
        {SHARD: 1},
        {SHARD: 2},
        line="0.2.2",
        more={REPLICATE: 2},
    ),
    Issue(
        2387,
        "routers differ from rank to rank",
        "NUM001",
        "the installed torchtitan trains this model wrong at tensor_parallel_degree 2",
        {TP: 2},
        {TP: 1},
        DEEPSEEK,
        line="0.2",
    ),
    Issue(
        2417,
        "CP of flex attention",
        "RUN001",
        "torchtitan itself refuses this run: ",
        {CP: 2},
        {CP: 1},
        ("deepseek_v3", "debugmodel_flex_attn"),
        line="0.2",
    ),
    Issue(
        2446,
        "qwen3 under TP and CP",
        "CP004",
        "is 2 beside tensor_parallel_degree 2, and the model's attention gets DTensors",
        {TP: 2},
        {TP: 1},
        ("qwen3", "8B"),
        line="0.2.2",
        more={CP: 2},
    ),
    Issue(
        2574,
        "TP above the number of KV heads",
        "TP002",
        "n_kv_heads = 8 is not a multiple of 16",
        {TP: 16},
        {TP: 4},
        ("llama3", "8B"),
    ),
    Issue(
        2668,
        "FSDP cuts a hidden size without EP",
        "FSDP001",
        "expert_hidden_dim (256) is not a multiple of 96",
        {SHARD: 96},
        {SHARD: 8},
        DEEPSEEK,
        line="0.3",
    ),
    Issue(
        2972,
        "gradients of a pipeline times its tokens",
        "NUM008",
        "the installed torchtitan trains this model wrong at pipeline_parallel_degree 2",
        {PP: 2},
        {PP: 1},
        line="0.2.2",
        more={"batch": 8},
    ),
    Issue(
        3082,
        "a dispatcher that wants EP",
        "RUN001",
        "HybridEPTokenDispatcher.Config requires expert parallelism (expert_parallel_degree > 1)",
        {EP: 1},
        {EP: 2},
        ("deepseek_v3", "debugmodel_hybridep"),
        line="0.3",
        more={SHARD: 2},
    ),
    Issue(
        3395,
        "a sequence beyond RoPE",
        "RUN001",
        "Training sequence length 10000000 exceeds attention RoPE maximum supported sequence length 131072",
        {"seq_len": 10_000_000},
        {"seq_len": 4096},
        line="0.3",
    ),
    Issue(
        4016,
        "a shipped config that cannot start",
        "TP002",
        "n_kv_heads = 2 is not a multiple of 4, in layers 3, 7, ..., 47 (12 of 48)",
        {},
        {TP: 2},
        ("qwen3_5", "122B-A10B"),
        line="0.3",
        config_name="qwen35_122b_a10b",
    ),
    Issue(
        4245,
        "a bias once per TP rank",
        "NUM004",
        "the installed torchtitan trains this model wrong at tensor_parallel_degree 2",
        {EP: 1},
        {EP: 2},
        GPT_OSS,
        line="0.3",
        more={TP: 2},
    ),
    Issue(
        4258,
        "experts that EP does not divide",
        "EP001",
        "num_experts = 8 is not a multiple of 3",
        {EP: 3, SHARD: 3},
        {EP: 2, SHARD: 2},
        DEEPSEEK,
    ),
    Issue(
        4332,
        "a bias' gradient divided by TP",
        "NUM005",
        "the installed torchtitan trains this model wrong at tensor_parallel_degree 2",
        {"spmd_backend": "partial_dtensor"},
        {"spmd_backend": "spmd_types", EP: 2},
        GPT_OSS,
        line="0.3",
        more={TP: 2},
    ),
)


def refused(issue: Issue, fields: dict[str, Any]) -> tuple[list[str], str]:
    """The codes of what speaks against a run, and the text in one line."""
    name, flavor = issue.model
    given = {SHARD: -1, **issue.more, **fields}
    config = job(name, flavor if OLD else flavor.lower(), config_name=issue.config_name, **given)
    error = refusal_of(config, world_size=issue.ranks)
    if error is None:
        return [], ""
    return [one.code for one in (*error.violations, *error.problems)], " ".join(str(error).split())


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
    codes, text = refused(issue, issue.run)
    assert issue.code in codes
    assert issue.words in text
    codes, text = refused(issue, issue.works)
    assert issue.code not in codes
    assert issue.words not in text


def test_thirty_of_them_are_judged() -> None:
    numbers = [issue.number for issue in ISSUES]
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= 30


def test_the_page_lists_them() -> None:
    page = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
    url = "https://github.com/pytorch/torchtitan/issues"
    rows = [
        f"| [#{issue.number}]({url}/{issue.number}) | {issue.happened} | {issue.code} |" for issue in ISSUES
    ]
    assert "\n".join(rows) in page
