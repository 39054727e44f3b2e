"""The rules: every kind of dimension that a mesh axis splits, what a run as a whole must keep, and why.

The readers of plans, the text of a refusal, ``tp-validate rule`` and ``docs/rules.md`` say what is said here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

ALIGNMENT = 8
"""Rows of a grouped matrix product: ``torch._grouped_mm`` wants strides of whole 16 bytes, of bfloat16."""


class Line(Enum):
    """Who splits a model, as far as what follows from an uneven split depends on it."""

    TORCHTITAN_0_2 = "torchtitan 0.2.x"
    SPMD_TYPES = "0.3.x, spmd_types"
    """The default backend of 0.3.x. It pads an uneven shard and goes on."""
    DTENSOR = "0.3.x, DTensor backends"
    """``partial_dtensor`` and ``full_dtensor``, which can tell an uneven shard from an even one."""
    DTENSOR_DOUBLED = "0.3.x, DTensor backends, beside a dimension of twice the size"
    """gpt-oss: one weight holds both halves of the gated projection, another takes their product."""
    ANY_TORCHTITAN = "torchtitan, of a line that is not told"
    """What a ``config.json`` is judged for."""
    KV_REPLICATION = "torchtitan, with KV-head replication"
    TRANSFORMERS = "transformers"


LINES = (Line.TORCHTITAN_0_2, Line.SPMD_TYPES, Line.DTENSOR)
"""Those that are shown side by side."""


@dataclass(frozen=True)
class Otherwise:
    """What an uneven split does where nobody checks.

    Attributes:
        short: in a few words, for a table.
        text: in a sentence, to follow "Without this check:"; empty where no such split is refused.
        silent: whether the run goes on without any error, to wrong results.
    """

    short: str
    text: str = ""
    silent: bool = False


@dataclass(frozen=True)
class Example:
    """A size with a degree that it allows and one that it does not."""

    size: int
    works: int
    fails: int


class _ByLine:
    """What two kinds of rules have in common."""

    otherwise: Mapping[Line, Otherwise]

    @property
    def in_short(self) -> dict[Line, str]:
        """What happens in each of `LINES`, in a few words; empty where there is no such rule."""
        told, before = {}, None
        for line in LINES:
            otherwise = self.otherwise.get(line)
            told[line] = "" if otherwise is None else "the same" if otherwise == before else otherwise.short
            before = otherwise
        return told


@dataclass(frozen=True)
class Rule(_ByLine):
    """One kind of dimension that a mesh axis splits.

    Attributes:
        code: stable name, e.g. ``TP002``.
        dim: what torchtitan calls the dimension, e.g. ``n_kv_heads``.
        why: why an uneven split cannot work.
        otherwise: what one does, by line and backend; a line that has no such dimension is left out.
        instead: what to do about it.
        example: where it is so.
        source: the upstream file or issue that the rule follows.
        axis: the mesh axis that splits it, by its field of ``ParallelDims``.
        scope: which of these dimensions are meant, to follow the name; empty where that is all of them.
    """

    code: str
    dim: str
    why: str
    otherwise: Mapping[Line, Otherwise]
    instead: str
    example: Example
    source: str
    axis: str = "tp"
    scope: str = ""


@dataclass(frozen=True)
class RunRule(_ByLine):
    """Something that a run as a whole has to keep, beside the dimensions that its model splits.

    Attributes:
        code: stable name, e.g. ``MESH001``.
        about: what it is about, in a few words.
        must: what must hold, as a sentence without its period.
        otherwise: what happens where it does not, by line and backend; a line that has no such rule is left
            out.
        instead: what to do about it.
        source: the upstream file or issue that the rule follows.
        warns: whether the run goes on, and is only told.
        can_be_repaired: whether ``--repair`` mends what is at fault.
    """

    code: str
    about: str
    must: str
    otherwise: Mapping[Line, Otherwise]
    instead: str
    source: str
    warns: bool = False
    can_be_repaired: bool = False


_SHAPE_ERROR = "\"shape '[...]' is invalid for input of size ...\""
_DIES = "dies in forward"

_HEADS_0_2 = Otherwise(
    _DIES,
    f"the run starts, and its first forward pass dies in attention with {_SHAPE_ERROR} or "
    '"Cannot unflatten unevenly sharded tensor".',
)
_HEADS_0_3 = Otherwise(
    "first layer refused late, later ones die",
    "torchtitan looks at the first such layer only, and not before the process groups are up; any other one "
    f"kills the first forward pass with {_SHAPE_ERROR}.",
)
_HEADS = {
    Line.SPMD_TYPES: _HEADS_0_3,
    Line.DTENSOR: _HEADS_0_3,
    Line.ANY_TORCHTITAN: Otherwise(
        _DIES, f"the run starts, and its first forward pass dies in attention with {_SHAPE_ERROR}."
    ),
}
_HEADS_OF_ALL = {
    Line.TORCHTITAN_0_2: _HEADS_0_2,
    **_HEADS,
    Line.TRANSFORMERS: Otherwise(
        _DIES,
        f"the model loads without a word, and its first forward pass dies in attention with {_SHAPE_ERROR}.",
    ),
}
_IMAGES_DIE = Otherwise(
    "dies with images",
    "the first forward pass with images dies; torchtitan does not look at these heads.",
)

_MLP_DIES = Otherwise(_DIES, 'the first forward pass dies with "a and b must have same reduction dim".')
_EMPTY_SHARD = Otherwise(
    "fine while no shard is empty",
    "the rank that is left without a part dies, or waits for ever, and so do the others.",
)
_ROWS = {
    Line.SPMD_TYPES: Otherwise(
        "silently wrong",
        "torchtitan pads the dimension to a multiple of the degree and trains on SILENTLY, with other losses "
        "and gradients than the model's own, and no error at all.",
        silent=True,
    ),
    Line.DTENSOR: _EMPTY_SHARD,
    Line.DTENSOR_DOUBLED: Otherwise(
        _DIES,
        'the first forward pass dies with "The size of tensor a must match the size of tensor b".',
    ),
}
_IN_STEP = " (gpt-oss: both halves cut in step)"

_BLOCKS = Otherwise(
    _DIES,
    "the first forward pass dies in the low-precision product, which finds a part of a block on every rank.",
)
_MISALIGNED = Otherwise(_DIES, 'the first forward pass dies with "strides should be multiple of 16 bytes".')
_PARTS_DIFFER = Otherwise(
    "the gathered parts would differ", "the parts of wk and wv that the ranks gather would differ in size."
)
_EXPERTS_0_3 = Otherwise(
    _DIES, "the first forward pass dies with \"shape '[2, -1]' is invalid for input of size ...\"."
)
_UNEVEN_ROWS = Otherwise(
    "parallelize raises",
    'the parallelize function stops with "FSDP does not support uneven sharding on dim 1", when the process '
    "groups are up.",
)

_DIVIDE = "take a tensor parallel degree that divides it"
_DTENSOR = "on 0.3.x take a DTensor backend (parallelism.spmd_backend), which can split it unevenly"
_DIVIDE_OR_DTENSOR = f"{_DIVIDE}, change the size, or {_DTENSOR}"
_OR_EXPERTS = "split whole experts instead, by an expert parallel degree"

_PARALLELIZE = "torchtitan models/*/parallelize.py; https://github.com/pytorch/torchtitan/issues/2574"
_QWEN3_5 = "torchtitan models/qwen3_5/model.py (Qwen35Model.Config.update_from_config)"
_SHARDING = "torchtitan models/common/decoder_sharding.py"

RULES: dict[str, Rule] = {
    rule.code: rule
    for rule in (
        Rule(
            code="TP001",
            dim="n_heads",
            why="wq is split by columns and wo by rows, so that every rank computes whole query heads",
            otherwise=_HEADS_OF_ALL,
            instead=_DIVIDE,
            example=Example(32, 8, 6),
            source=_PARALLELIZE,
            scope="(MLA too)",
        ),
        Rule(
            code="TP002",
            dim="n_kv_heads",
            why="wk and wv are split by columns, so that every rank computes whole key-value heads",
            otherwise={
                **_HEADS_OF_ALL,
                Line.KV_REPLICATION: Otherwise(
                    _DIES,
                    "ranks would need parts of two key-value heads, and the first forward pass would die.",
                ),
            },
            instead=f"{_DIVIDE}, or a multiple of it with KV-head replication (--replicate-kv-heads)",
            example=Example(2, 2, 4),
            source=_PARALLELIZE,
        ),
        Rule(
            code="TP003",
            dim="n_key_heads",
            why="the query and key projections of a gated-delta layer are split by whole key heads",
            otherwise=_HEADS,
            instead=_DIVIDE,
            example=Example(16, 8, 6),
            source=_QWEN3_5,
            scope="of gated-delta layers",
        ),
        Rule(
            code="TP004",
            dim="n_value_heads",
            why="the value projections of a gated-delta layer are split by whole value heads",
            otherwise=_HEADS,
            instead=_DIVIDE,
            example=Example(32, 16, 12),
            source=_QWEN3_5,
            scope="of gated-delta layers",
        ),
        Rule(
            code="TP005",
            dim="feed_forward_hidden_dim",
            why="w1 and w3 are split by columns and w2 by rows, so that every rank has an equal part",
            otherwise={Line.TORCHTITAN_0_2: _MLP_DIES, **_ROWS},
            instead=_DIVIDE_OR_DTENSOR,
            example=Example(14336, 8, 6),
            source=_SHARDING,
        ),
        Rule(
            code="TP006",
            dim="vocab_size",
            why="the embedding and the output projection are split over the vocabulary",
            otherwise={
                Line.TORCHTITAN_0_2: Otherwise(
                    _EMPTY_SHARD.short,
                    "the rank without any vocabulary dies in its first forward pass, and the others hang.",
                ),
                **_ROWS,
                Line.SPMD_TYPES: Otherwise(
                    "last rank raises, the others hang",
                    "the loss raises a ValueError on the last rank only, and every other rank hangs until "
                    "its collectives time out.",
                ),
            },
            instead=f"{_DIVIDE}, pad the vocabulary to a multiple of it, or {_DTENSOR}",
            example=Example(32001, 3, 2),
            source="torchtitan components/loss.py, models/common/decoder_sharding.py",
        ),
        Rule(
            code="TP007",
            dim="vision_num_heads",
            why="the projections of the vision encoder's attention are split by whole heads",
            otherwise={Line.SPMD_TYPES: _IMAGES_DIE, Line.DTENSOR: _IMAGES_DIE},
            instead=_DIVIDE,
            example=Example(16, 16, 32),
            source="torchtitan models/common/vision_encoder_sharding.py",
        ),
        Rule(
            code="TP008",
            dim="vision_hidden_dim",
            why="a hidden layer of the vision encoder is split by columns and then by rows",
            otherwise=_ROWS,
            instead=_DIVIDE_OR_DTENSOR,
            example=Example(4304, 16, 32),
            source="torchtitan models/common/vision_encoder_sharding.py",
        ),
        Rule(
            code="TP009",
            dim="seq_len",
            why="the activations between the blocks are split over the sequence",
            otherwise={
                Line.TORCHTITAN_0_2: Otherwise(
                    "parallelize asserts",
                    "the parallelize function stops with an AssertionError, when the process groups are up.",
                ),
                Line.SPMD_TYPES: Otherwise(
                    "Trainer refuses late",
                    "the Trainer refuses it when the process groups are up; without a Trainer, forward "
                    "aborts.",
                ),
                Line.DTENSOR: Otherwise(
                    "Trainer refuses late, else fine",
                    "the Trainer refuses it when the process groups are up.",
                ),
            },
            instead="take a sequence length that is a multiple of the degree, times twice the context "
            "parallel degree where there is one",
            example=Example(4096, 8, 6),
            source="torchtitan models/*/parallelize.py, trainer.py (seq_len_divisor)",
            scope="(times 2 CP; the guards know it)",
        ),
        Rule(
            code="TP010",
            dim="shared_expert_hidden_dim",
            why="w1 and w3 of the shared expert are split by columns and w2 by rows",
            otherwise={Line.TORCHTITAN_0_2: _MLP_DIES, **_ROWS},
            instead=_DIVIDE_OR_DTENSOR,
            example=Example(512, 8, 6),
            source="torchtitan models/common/moe_sharding.py",
        ),
        Rule(
            code="TP011",
            dim="expert_hidden_dim",
            why="the hidden dimension of the routed experts is split over the TP axis",
            otherwise={
                **_ROWS,
                Line.TORCHTITAN_0_2: replace(_MLP_DIES, short=f"fine{_IN_STEP}"),
                Line.SPMD_TYPES: Otherwise(
                    "silently wrong",
                    "the first forward pass dies, or the dimension is padded and training is SILENTLY wrong.",
                    silent=True,
                ),
                Line.DTENSOR: replace(_EMPTY_SHARD, short=f"{_EMPTY_SHARD.short}{_IN_STEP}"),
            },
            instead=f"{_DIVIDE}, or {_OR_EXPERTS}",
            example=Example(1408, 8, 6),
            source="torchtitan models/common/moe_sharding.py",
            scope="without EP",
        ),
        Rule(
            code="TP012",
            dim="sharded_dim",
            why="the model's own sharding configuration splits it over the TP axis",
            otherwise=_ROWS,
            instead=_DIVIDE_OR_DTENSOR,
            example=Example(100, 4, 8),
            source="torchtitan protocols/sharding.py (ShardingConfig.state_shardings)",
            scope="(any other parameter that a model declares split)",
        ),
        Rule(
            code="TP013",
            dim="expert_hidden_dim",
            why="the grouped product of routed experts takes rows of whole 16 bytes, "
            f"{ALIGNMENT} in bfloat16",
            otherwise={
                Line.TORCHTITAN_0_2: replace(_MISALIGNED, short=f"{_DIES} if use_grouped_mm"),
                Line.SPMD_TYPES: _MISALIGNED,
                Line.DTENSOR: _MISALIGNED,
            },
            instead=f"take a tensor parallel degree that leaves a multiple of {ALIGNMENT} on each rank, or "
            f"{_OR_EXPERTS}",
            example=Example(48, 2, 4),
            source="torch._grouped_mm; torchtitan models/common/moe.py (GroupedExperts), "
            "0.2.x models/moe/moe.py",
            scope=f"without EP, on CUDA: a multiple of {ALIGNMENT} on each rank",
        ),
        Rule(
            code="TP014",
            dim="kv_projection_rows",
            why="with shared key-value heads wk and wv stay split by rows over all ranks, through a head",
            otherwise=dict.fromkeys(LINES, _PARTS_DIFFER),
            instead=_DIVIDE,
            example=Example(256, 16, 48),
            source="torchtitan_tp_validate/kv_replication",
            scope="under KV-head replication",
        ),
        Rule(
            code="TP015",
            dim="low_precision_dim",
            why="a low-precision product takes whole blocks: every rank's part of a weight is made of them",
            otherwise={Line.SPMD_TYPES: _BLOCKS, Line.DTENSOR: _BLOCKS},
            instead="take a tensor parallel degree that leaves whole blocks on each rank, or leave the "
            "module out of the conversion",
            example=Example(48, 3, 2),
            source="torchtitan components/quantization/{float8,mx,nvfp4}.py; torchao float8, "
            "prototype/moe_training (MXFP8, NVFP4)",
            scope="(in whole blocks of the product)",
        ),
        Rule(
            code="EP001",
            dim="num_experts",
            why="every rank of the expert parallel axis holds the same number of experts",
            otherwise={
                Line.TORCHTITAN_0_2: Otherwise(
                    _DIES, 'the first forward pass dies with "Split sizes doesn\'t match total dim 0 size".'
                ),
                Line.SPMD_TYPES: _EXPERTS_0_3,
                Line.DTENSOR: _EXPERTS_0_3,
            },
            instead="take an expert parallel degree that divides it",
            example=Example(6, 3, 4),
            source="torchtitan models/common/moe_sharding.py, distributed/expert_parallel.py",
            axis="ep",
            scope="(by the EP degree)",
        ),
        Rule(
            code="FSDP001",
            dim="expert_hidden_dim",
            why="with more ranks than experts, FSDP cuts the rows of their weights, and only evenly",
            otherwise={
                Line.TORCHTITAN_0_2: replace(_UNEVEN_ROWS, short=f"with EP, {_UNEVEN_ROWS.short}"),
                Line.SPMD_TYPES: _UNEVEN_ROWS,
                Line.DTENSOR: _UNEVEN_ROWS,
            },
            instead="shard the data over fewer ranks: no more than there are experts, or a number that "
            "divides the rows",
            example=Example(80, 16, 32),
            source="torchtitan distributed/fsdp.py, 0.2.x models/llama4/infra/parallelize.py (apply_fsdp); "
            "torch/distributed/fsdp/_fully_shard/_fsdp_param.py",
            axis="dp_shard",
            scope="and dim, by the data parallel shard degree, with more ranks than experts",
        ),
    )
}


def _everywhere(short: str, text: str, *, silent: bool = False) -> Mapping[Line, Otherwise]:
    return dict.fromkeys(LINES, Otherwise(short, text, silent))


_PARALLEL_DIMS = "torchtitan distributed/parallel_dims.py"
_PIPELINE = "torchtitan distributed/pipeline_parallel.py"
_SCHEDULES = "torch/distributed/pipelining/schedules.py"
_UP = "when the process groups are up"
_PIPELINE_RAISES = _everywhere(
    "pipeline raises", f"torchtitan stops with a ValueError as it splits the model into stages, {_UP}."
)
_SCHEDULE_RAISES = _everywhere(
    "schedule raises",
    f"torch stops with a ValueError as the schedule is built, {_UP} and the weights are laid out.",
)

_SPLIT_BACKWARD = (
    "a schedule that computes the gradients of weights apart (InterleavedZeroBubble, ZBVZeroBubble, "
    "DualPipeV)"
)

RUN_RULES: dict[str, RunRule] = {
    rule.code: rule
    for rule in (
        RunRule(
            code="MESH001",
            about="world size",
            must="the product of the replicate, shard, context, tensor and pipeline parallel degrees is the "
            "number of ranks",
            otherwise=_everywhere(
                "every rank asserts", f"every rank stops with an AssertionError, {_UP} and no sooner."
            ),
            instead="set data_parallel_shard_degree to what is left, or to -1 where the other degrees divide "
            "the number of ranks",
            source=f"{_PARALLEL_DIMS} (ParallelDims._validate)",
        ),
        RunRule(
            code="MESH002",
            about="ranks of the experts",
            must="the ranks that share a batch of layers (shard x context x tensor) are a multiple of the "
            "expert parallel degree (times the expert tensor parallel degree in 0.2.x)",
            otherwise=_everywhere(
                "mesh raises", "every rank stops as torchtitan lays out the mesh of the experts."
            ),
            instead="take an expert parallel degree that divides them",
            source=f"{_PARALLEL_DIMS} (ParallelDims.build_mesh)",
        ),
        RunRule(
            code="MESH003",
            about="expert tensor parallel degree",
            must="with expert parallelism, expert_tensor_parallel_degree is 1 or tensor_parallel_degree",
            otherwise={
                Line.TORCHTITAN_0_2: Otherwise(
                    "every rank asserts", f"every rank stops with an AssertionError, {_UP}."
                )
            },
            instead="set it to 1 or to the tensor parallel degree",
            source=f"{_PARALLEL_DIMS} (ParallelDims._validate) of 0.2.x",
        ),
        RunRule(
            code="MESH004",
            about="replicas without shards",
            must="data_parallel_replicate_degree is the only degree above 1 where nothing is sharded over "
            "data (DDP)",
            otherwise={
                Line.TORCHTITAN_0_2: Otherwise(
                    "llama raises, others silently wrong",
                    'llama3 and llama4 stop with "DDP has not supported > 1D parallelism"; the other models '
                    "train on, SILENTLY without the gradients of parameters that tensor parallelism holds.",
                    silent=True,
                )
            },
            instead="shard the data too (data_parallel_shard_degree of 2 or more), or replicate nothing",
            source="torchtitan models/*/infra/parallelize.py of 0.2.x; "
            "https://github.com/pytorch/torchtitan/issues/577",
        ),
        RunRule(
            code="MESH005",
            about="experts without shards",
            must="expert parallelism comes with a data parallel shard degree or a context parallel degree "
            "above 1",
            otherwise={
                Line.TORCHTITAN_0_2: Otherwise(
                    "parallelize raises",
                    "the parallelize function stops with \"Mesh '['fsdp']' is not available\", when the "
                    "process groups are up.",
                )
            },
            instead="shard the data (data_parallel_shard_degree of 2 or more), or leave out expert "
            "parallelism",
            source="torchtitan models/{llama4,deepseek_v3,gpt_oss}/infra/parallelize.py of 0.2.x",
        ),
        RunRule(
            code="MESH006",
            about="gradients of qwen3's experts",
            must="where FSDP shards nothing, every rank of a tensor parallel group has other experts: the "
            "expert parallel degree is the tensor parallel degree",
            otherwise={
                Line.TORCHTITAN_0_2: Otherwise(
                    "silently wrong",
                    "the gradients of the experts, each rank's of its own tokens, are not summed over the "
                    "ranks that have the same experts, SILENTLY: they are half as large or less, and the "
                    "copies drift apart.",
                    silent=True,
                )
            },
            instead="shard the data too, or take the tensor parallel degree for the experts",
            source="torchtitan models/qwen3/infra/parallelize.py of 0.2.x, measured at TP 4 x EP 2",
        ),
        RunRule(
            code="MESH007",
            about="experts under CP and TP on full_dtensor",
            must="on full_dtensor experts are not split (EP) where context and tensor parallelism both split "
            "several sequences at a time",
            otherwise={
                Line.DTENSOR: Otherwise(
                    "dies in step 1",
                    'torch stops every rank in the first step with "Cannot unflatten tensor with '
                    '_StridedShard placement": it cannot take apart again what lays all tokens in a row.',
                )
            },
            instead="set parallelism.spmd_backend to spmd_types or partial_dtensor, or one of the three "
            "degrees to 1",
            source="torch/distributed/tensor/_ops/_view_ops.py; measured with qwen3, deepseek_v3 and gpt_oss "
            "of 0.3.0",
        ),
        RunRule(
            code="NODE001",
            about="ranks of a node",
            must="the ranks of a tensor or expert parallel group are on one node",
            otherwise=_everywhere(
                "slow", "every layer waits for the network between nodes, several times in each step."
            ),
            instead="take degrees whose product divides the number of GPUs of a node",
            source="torchtitan docs; NVLink is an order of magnitude faster than the network",
            warns=True,
        ),
        RunRule(
            code="PP001",
            about="stages and ranks",
            must="the number of pipeline stages is a multiple of the pipeline parallel degree",
            otherwise=_PIPELINE_RAISES,
            instead="change pipeline_parallel_layers_per_stage",
            source=_PIPELINE,
        ),
        RunRule(
            code="PP002",
            about="stages of a rank",
            must="a schedule gets the number of stages on each rank that it is made for: one (1F1B, GPipe), "
            "two (ZBVZeroBubble, DualPipeV), or two and more",
            otherwise=_PIPELINE_RAISES,
            instead="change pipeline_parallel_layers_per_stage, or the schedule",
            source=f"{_PIPELINE}; {_SCHEDULES}",
        ),
        RunRule(
            code="PP003",
            about="stages and layers",
            must="there is a layer for every stage, the embedding and the output counted as "
            "pipeline_parallel_first_stage_less_layers and pipeline_parallel_last_stage_less_layers; no list "
            "of module_fqns_per_model_part is empty",
            otherwise=_everywhere(
                "pipeline raises",
                "torchtitan stops with a ValueError as it splits the model into stages, or as the optimizer "
                f"of an empty one is made, {_UP}.",
            ),
            instead="take fewer stages, or lower the two weights",
            source=_PIPELINE,
        ),
        RunRule(
            code="PP004",
            about="microbatch size",
            must="the local batch size is a multiple of pipeline_parallel_microbatch_size",
            otherwise=_PIPELINE_RAISES,
            instead="change training.local_batch_size or parallelism.pipeline_parallel_microbatch_size",
            source=_PIPELINE,
        ),
        RunRule(
            code="PP005",
            about="number of microbatches",
            must="the schedule gets as many microbatches as it needs: at least one for every stage (1F1B, "
            "DualPipeV), or a multiple of its rounds (Interleaved1F1B, InterleavedZeroBubble)",
            otherwise=_SCHEDULE_RAISES,
            instead="raise training.local_batch_size, or lower parallelism.pipeline_parallel_microbatch_size "
            "(main: change parallelism.num_pp_microbatches)",
            source=_SCHEDULES,
        ),
        RunRule(
            code="PP006",
            about="models without pipelines",
            must="pipeline parallelism is for models that torchtitan can split into stages",
            otherwise=_everywhere(
                "Trainer raises",
                'the Trainer stops with "Pipeline Parallel is enabled but ... does not support pipelining", '
                "when the process groups are up.",
            ),
            instead="set pipeline_parallel_degree to 1",
            source="torchtitan trainer.py, 0.2.x train.py",
        ),
        RunRule(
            code="PP007",
            about="name of the schedule",
            must="the schedule is one that torch has",
            otherwise=_PIPELINE_RAISES,
            instead="set parallelism.pipeline_parallel_schedule",
            source=f"{_SCHEDULES} (get_schedule_class)",
        ),
        RunRule(
            code="PP008",
            about="modules of the stages",
            must="module_fqns_per_model_part names every module of the model once",
            otherwise=_everywhere(
                "silently wrong",
                "a module that no stage names is left out SILENTLY, and one that two stages name is trained "
                "as two: another model is trained.",
                silent=True,
            ),
            instead="name every layer, tok_embeddings, norm and the output in one of the lists",
            source=f"{_PIPELINE} (module_names_per_stage)",
        ),
        RunRule(
            code="PP009",
            about="DualPipeV with experts",
            must="DualPipeV, which overlaps the experts' communication, runs without activation "
            "checkpointing",
            otherwise={
                Line.TORCHTITAN_0_2: Otherwise(
                    "parallelize raises", f"the parallelize function stops with a NotImplementedError, {_UP}."
                )
            },
            instead="set activation_checkpoint.mode to none, "
            "parallelism.pipeline_parallel_expert_parallel_overlap to false, or take ZBVZeroBubble",
            source="torchtitan distributed/dual_pipe_v.py of 0.2.1 and 0.2.2",
        ),
        RunRule(
            code="PP010",
            about="recomputation in zero-bubble schedules",
            must=f"{_SPLIT_BACKWARD} goes without selective activation checkpointing",
            otherwise=_everywhere(
                "dies in step 1",
                'torch stops the first backward pass with "Trying to backward an extra time. You are only '
                'allowed to backward once on any region computed under selective activation checkpoint".',
            ),
            instead="checkpoint whole layers (activation-checkpoint:full, 0.2.x: activation_checkpoint.mode "
            "full) or nothing, or take Interleaved1F1B",
            source="torch/utils/checkpoint.py (_CachedTorchDispatchMode), "
            "torch/distributed/pipelining/_backward.py; measured on 0.2.2, 0.3.0 and main",
        ),
        RunRule(
            code="PP011",
            about="compilation in zero-bubble schedules",
            must=f"{_SPLIT_BACKWARD} goes without torch.compile, or (0.3.x) with that of the model alone and "
            "whole layers recomputed",
            otherwise={
                Line.TORCHTITAN_0_2: Otherwise(
                    "schedule raises",
                    'torch 2.13 stops with "The ... schedule is not supported with stage modules that have '
                    f'used torch.compile" as the schedule is built, {_UP} and the weights are laid out.',
                ),
                **dict.fromkeys(
                    LINES[1:],
                    Otherwise(
                        "dies in step 1",
                        'torch stops the first backward pass with "This backward function was compiled '
                        "with non-empty donated buffers which requires create_graph=False and "
                        'retain_graph=False".',
                    ),
                ),
            },
            instead="take Interleaved1F1B, or set compile.enable to false; or, with 0.3.x, compile the model "
            "alone and checkpoint whole layers (activation-checkpoint:full), or set "
            "torch._functorch.config.donated_buffer to False where the run starts, and --allow PP011",
            source="torch/_functorch/config.py (donated_buffer), torch/distributed/pipelining/_backward.py "
            "(retain_graph); measured on 0.2.2 and 0.3.0",
        ),
        RunRule(
            code="PP012",
            about="pipelines of graph_trainer",
            must="the pipelines of torchtitan's graph_trainer run with a torch whose stages have the cache "
            "that they write to: 2.13 has it, and 2.15 has not",
            otherwise=dict.fromkeys(
                LINES[1:],
                Otherwise(
                    "dies in step 1",
                    "every rank stops in the first forward pass with \"'GraphPipelineStage' object has no "
                    "attribute 'fwd_cache'\".",
                ),
            ),
            instead="set pipeline_parallel_degree to 1, or take the model from torchtitan.models",
            source="torchtitan experiments/graph_trainer/graph_pp/runner.py, "
            "torch/distributed/pipelining/stage.py",
        ),
        RunRule(
            code="SEQ001",
            about="sequence of context parallelism",
            must="training.seq_len (main: num_tokens_per_microbatch_per_dp_rank) is a multiple of twice the "
            "context parallel degree (0.2.x: of two, whatever the degree)",
            otherwise=_everywhere("stops late", f"torchtitan stops the run, {_UP}."),
            instead="change training.seq_len (main: num_tokens_per_microbatch_per_dp_rank)",
            source="torchtitan trainer.py (seq_len_divisor), 0.2.x models/*/infra/parallelize.py",
        ),
        RunRule(
            code="CP001",
            about="stages without layers",
            must="with context parallelism, partial_dtensor wants a layer in every pipeline stage",
            otherwise={
                Line.DTENSOR: Otherwise(
                    "parallelize raises",
                    'the ranks of that stage stop with "list index out of range", and the others wait.',
                )
            },
            instead="lower pipeline_parallel_first_stage_less_layers or "
            "pipeline_parallel_last_stage_less_layers, or take fewer stages",
            source="torchtitan distributed/context_parallel/api.py (apply_cp_to_forward)",
        ),
        RunRule(
            code="CP002",
            about="attention of context parallelism",
            must="with context parallelism no backend takes variable-length attention, and spmd_types and "
            "full_dtensor take flex attention only",
            otherwise=dict.fromkeys(
                (Line.SPMD_TYPES, Line.DTENSOR),
                Otherwise("parallelize raises", f"the parallelize function stops every rank, {_UP}."),
            ),
            instead='build the model with attn_backend="flex", or set context_parallel_degree to 1',
            source="torchtitan distributed/full_dtensor.py (validate_config), "
            "distributed/context_parallel/api.py",
        ),
        RunRule(
            code="CP003",
            about="blocks of flex attention's masks under CP",
            must="with context parallelism each rank gets whole blocks of flex attention's masks, of 128 "
            "tokens unless the model says otherwise",
            otherwise=_everywhere(
                "dies in step 1",
                "torch stops every rank with a NotImplementedError in the first step, as it cuts the masks.",
            ),
            instead="lower context_parallel_degree, or change training.seq_len",
            source="torch/distributed/tensor/experimental/_context_parallel/_attention.py "
            "(_create_cp_block_mask)",
        ),
        RunRule(
            code="CP004",
            about="qwen3 under CP",
            must="context parallelism cuts all that a model computes of a sequence: of qwen3, 0.2.0 and "
            "0.2.1 do not, and 0.2.2 does without tensor parallelism only",
            otherwise={
                Line.TORCHTITAN_0_2: Otherwise(
                    "dies in step 1 or trains silently wrong",
                    "0.2.0 stops every rank in the first step with \"object has no attribute 'freqs_cis'\"; "
                    "0.2.1 gives every rank the positions of the first one, SILENTLY; 0.2.2 stops every rank "
                    "in the first forward pass with an AssertionError without words.",
                    silent=True,
                )
            },
            instead="set context_parallel_degree to 1 (with 0.2.2 tensor_parallel_degree will do), or take "
            "0.3.x",
            source="torchtitan train.py of 0.2.0 and 0.2.1, models/qwen3/infra/parallelize.py of 0.2.2; "
            "torch/distributed/tensor/experimental/_context_parallel/_attention.py (sdpa_input_fn)",
        ),
        RunRule(
            code="TIE001",
            about="tied weights under FSDP",
            must="a model whose embedding and output are tied is not sharded over data",
            otherwise={
                Line.TORCHTITAN_0_2: Otherwise(
                    _DIES,
                    'torch stops every rank in the first forward pass with "shared with a parameter already '
                    'managed by another FSDP group".',
                )
            },
            instead="set data_parallel_shard_degree to 1, untie the weights (enable_weight_tying), take an "
            "older torch, or 0.3.x",
            source="torch/distributed/fsdp/_fully_shard/_fsdp_state.py; torchtitan models/qwen3 of 0.2.x",
        ),
        RunRule(
            code="BATCH001",
            about="global batch size",
            must="training.global_batch_size is a multiple of the local batch size times the data parallel "
            "degrees (main: num_tokens_per_train_step of all tokens of a microbatch, times their number)",
            otherwise=_everywhere(
                "every rank stops", f"every rank stops with an AssertionError (main: a ValueError), {_UP}."
            ),
            instead="change training.global_batch_size or training.local_batch_size (main: "
            "num_tokens_per_train_step)",
            source="torchtitan trainer.py, 0.2.x train.py",
        ),
        RunRule(
            code="DATA001",
            about="batches of qwen3_5",
            must="the data loader of a qwen3_5 names the special tokens of images, as MMDataLoader does",
            otherwise=dict.fromkeys(
                (Line.SPMD_TYPES, Line.DTENSOR),
                Otherwise(
                    _DIES,
                    "the first forward pass dies with \"'NoneType' object is not subscriptable\": it looks "
                    "up the token of images, also where there are none.",
                ),
            ),
            instead="take MMDataLoader, or torchtitan's main",
            source="torchtitan models/qwen3_5/model.py (_prepare_multimodal_embeds) of 0.3.0",
        ),
        RunRule(
            code="VAL001",
            about="validation to the end of the data",
            must="several data parallel ranks validate a number of batches, not all that each of them has",
            otherwise=_everywhere(
                "may hang",
                "the rank whose share of the data ends first leaves the others waiting for it in the next "
                "collective of the validation, until that times out.",
            ),
            instead="set it to a number of batches that every rank has",
            source="torchtitan components/validate.py; https://github.com/pytorch/torchtitan/issues/1618, "
            "https://github.com/pytorch/torchtitan/issues/4807",
            warns=True,
        ),
        RunRule(
            code="VAL002",
            about="validation of the model",
            must="the validator of a run that validates feeds the model as the Trainer does",
            otherwise=_everywhere(
                "dies in validation",
                "every rank stops behind the first step, in the first validation; without a validator, with "
                "an AssertionError as the Trainer is built.",
            ),
            instead="set validation.enable (0.3.x: validator.enable) to false",
            source="torchtitan components/validate.py, models/*/__init__.py (build_validator_fn) of 0.2.x",
        ),
        RunRule(
            code="VAL003",
            about="validation batch of a pipeline",
            must="validation.local_batch_size is a multiple of the number of microbatches of a pipeline: "
            "training.local_batch_size / pipeline_parallel_microbatch_size",
            otherwise={
                Line.TORCHTITAN_0_2: Otherwise(
                    "dies in validation",
                    'every rank stops behind the first step, in the first validation: "Expecting 8 arg_mbs '
                    'but got 4", or as a microbatch of another size is sent.',
                )
            },
            instead="change validation.local_batch_size",
            source="torchtitan components/validate.py of 0.2.x (pp_schedule.eval)",
        ),
        RunRule(
            code="VAL004",
            about="validation loss under context parallelism",
            must="a run with context parallelism divides its validation loss by all tokens",
            otherwise={
                Line.TORCHTITAN_0_2: Otherwise(
                    "logged wrong",
                    "the validation loss that is logged is context_parallel_degree times what it is: labels "
                    "are counted when they have been cut. Training is not touched.",
                )
            },
            instead="divide the loss that is logged by context_parallel_degree, or take 0.3.x",
            source="torchtitan components/validate.py of 0.2.2 (local_valid_tokens)",
            warns=True,
        ),
        RunRule(
            code="OPT001",
            about="groups of the optimizer",
            must="every pattern of optimizer.param_groups matches a parameter of every pipeline stage",
            otherwise=dict.fromkeys(
                (Line.SPMD_TYPES, Line.DTENSOR),
                Otherwise(
                    "Trainer raises",
                    'the ranks of that stage stop with "Optimizer param_groups pattern ... matched no '
                    'parameters", when the weights are laid out, and the others wait.',
                ),
            ),
            instead="give the optimizer patterns that every stage has something of, or set "
            "pipeline_parallel_degree to 1",
            source="torchtitan components/optimizer/optimizer.py (_build_param_groups)",
        ),
        RunRule(
            code="CKPT002",
            about="data ranks of a checkpoint",
            must="a run that resumes has as many data parallel ranks as the one that wrote its checkpoint",
            otherwise=_everywhere(
                "dies as it loads",
                "every data rank has a state of its own in it: with fewer ranks torchtitan stops with "
                '"dp_degree is inconsistent before and after checkpoint" (main: "cannot resume after '
                'changing the effective data-parallel degree"), with more torch with "Missing key in '
                f'checkpoint state_dict: dataloader.dp_rank_...", {_UP}.',
            ),
            instead="keep the number of data parallel ranks",
            source="torchtitan components/dataloader.py (ParallelAwareDataloader.load_state_dict), main "
            "components/data/loader.py; https://github.com/pytorch/torchtitan/issues/811",
        ),
        RunRule(
            code="CKPT003",
            about="a checkpoint of the model alone",
            must="what a run resumes from holds its optimizer, learning rate scheduler and step, too",
            otherwise=_everywhere(
                "dies as it loads",
                "the last checkpoint of a run is of the model alone, unless checkpoint.last_save_model_only "
                f"is false: torch does not find the others in it, {_UP}.",
            ),
            instead="resume from an earlier step (--checkpoint.load_step), or begin a run from these weights "
            "(--checkpoint.initial_load_path) with another --checkpoint.folder",
            source="torchtitan components/checkpoint.py (_save_last_step, _states_to_load)",
        ),
        RunRule(
            code="CKPT004",
            about="weights of a checkpoint",
            must="a checkpoint holds every weight of the model, and of the same size",
            otherwise=_everywhere(
                "dies as it loads",
                'torch stops with "Missing key in checkpoint state_dict", "Size mismatch" or "metadata is '
                f'None", {_UP}.',
            ),
            instead="load a checkpoint of this model, or run the model of the checkpoint: with the flavor, "
            "the converters and the KV-head replication that it was trained with",
            source="torch/distributed/checkpoint/default_planner.py (create_default_local_load_plan)",
        ),
        RunRule(
            code="RUN001",
            about="torchtitan's own checks",
            must="torchtitan looks at a model's config when the process groups are up",
            otherwise=_everywhere("stops late", f"torchtitan stops every rank with these words, {_UP}."),
            instead="do as it says",
            source="torchtitan models/*/model.py (update_from_config), 0.2.x models/*/model/args.py",
        ),
        RunRule(
            code="RUN002",
            about="torchtitan's own checks of a layout",
            must="it looks at the run before it splits the model",
            otherwise=_everywhere(
                "parallelize raises", f"the parallelize function stops every rank with these words, {_UP}."
            ),
            instead="do as it says",
            source="torchtitan models/*/parallelize.py, 0.2.x models/*/infra/parallelize.py",
        ),
    )
}


def _wrong(line: Line, *others: Line, short: str = "silently wrong", text: str) -> Mapping[Line, Otherwise]:
    return dict.fromkeys((line, *others), Otherwise(short, text, silent=True))


_MOE_0_2 = "torchtitan models/moe/moe.py, models/llama4/infra/parallelize.py (apply_moe_ep_tp) of 0.2.x"
_ROUTER_ISSUES = "https://github.com/pytorch/torchtitan/issues/1805, mended in #2416, in no 0.2.x"

FAULTS: dict[str, RunRule] = {
    rule.code: rule
    for rule in (
        RunRule(
            code="NUM001",
            about="router gradients under TP",
            must="under tensor parallelism, the scores of the router are applied before the experts "
            "(score_before_experts)",
            otherwise=_wrong(
                Line.TORCHTITAN_0_2,
                text="the gradient of the router's gate is not summed over the TP ranks, SILENTLY: it is 50 "
                "to 72 % off, and the ranks' copies of the gate drift apart, with an equal loss in step 1.",
            ),
            instead="repair it (--repair), split whole experts over more data ranks instead of TP, or take "
            "0.3.x",
            source=f"{_MOE_0_2}; {_ROUTER_ISSUES}",
            can_be_repaired=True,
        ),
        RunRule(
            code="NUM002",
            about="router gradients under EP beside TP",
            must="expert parallelism beside tensor parallelism splits the experts over TP too "
            "(expert_tensor_parallel_degree = tensor_parallel_degree)",
            otherwise=_wrong(
                Line.TORCHTITAN_0_2,
                text="the gradients of the router's gate and of what the experts give back are not summed "
                "over the TP ranks, SILENTLY: the gate's is 63 to 104 % off, and its copies drift apart.",
            ),
            instead="repair it (--repair), set expert_tensor_parallel_degree to the tensor parallel degree "
            "(llama4), or take 0.3.x",
            source=f"{_MOE_0_2}; {_ROUTER_ISSUES}",
            can_be_repaired=True,
        ),
        RunRule(
            code="NUM003",
            about="gpt-oss's second bias under ETP",
            must="gpt-oss's experts are not split over TP under expert parallelism",
            otherwise=_wrong(
                Line.TORCHTITAN_0_2,
                text="the second bias of the experts is added once per TP rank, SILENTLY: the loss is 2e-4 "
                "off, the gradients of the experts 20 to 25 %.",
            ),
            instead="repair it (--repair), or take 0.3.x",
            source="torchtitan models/gpt_oss/model/moe.py of 0.2.x",
            can_be_repaired=True,
        ),
        RunRule(
            code="NUM004",
            about="gpt-oss's second bias under TP",
            must="gpt-oss's experts are not split over TP alone",
            otherwise=_wrong(
                Line.SPMD_TYPES,
                text="the second bias of the experts is added once per TP rank, SILENTLY: the loss is 2e-3 "
                "off, the gradient of that bias 121 %, of the first product 66 %.",
            ),
            instead="repair it (--repair), or set expert_parallel_degree to 2 or more",
            source="torchtitan models/gpt_oss/moe.py; https://github.com/pytorch/torchtitan/pull/4245, which "
            "mends the forward pass only: in main the gradient of that bias is multiplied by the degree",
            can_be_repaired=True,
        ),
        RunRule(
            code="NUM005",
            about="gpt-oss's output bias on the DTensor backends",
            must="under tensor parallelism gpt-oss runs on spmd_types",
            otherwise=_wrong(
                Line.DTENSOR,
                text="the gradient of attention.wo.bias is divided by the tensor parallel degree, SILENTLY.",
            ),
            instead="repair it (--repair), or set parallelism.spmd_backend to spmd_types, with an expert "
            "parallel degree of 2 or more",
            source="torchtitan models/common/linear.py (ScaledBiasRowwiseLinear), still in main",
            can_be_repaired=True,
        ),
        RunRule(
            code="NUM006",
            about="one sequence at a time on the DTensor backends",
            must="each data rank computes two sequences or more at a time, which main never does: its "
            "batches are one row of tokens",
            otherwise=_wrong(
                Line.DTENSOR,
                text="the gradient of what local_map waits for is lost, SILENTLY: of the routed experts' "
                "input under tensor parallelism (the norm before them is 16 to 106 % off), of keys and "
                "values under context parallelism.",
            ),
            instead="repair it (--repair), set parallelism.spmd_backend to spmd_types, or (0.3.0) "
            "training.local_batch_size, in a pipeline parallelism.pipeline_parallel_microbatch_size, to 2 or "
            "more",
            source="torch/distributed/tensor/experimental/_func_map.py; "
            "https://github.com/pytorch/pytorch/issues/151240; torchtitan of 0.3.x and main",
            can_be_repaired=True,
        ),
        RunRule(
            code="NUM007",
            about="frozen weights on spmd_types",
            must="LoRA adapters are trained on partial_dtensor or full_dtensor",
            otherwise=_wrong(
                Line.SPMD_TYPES,
                text="the frozen base weights are trained too, SILENTLY: parallelize makes every parameter "
                "anew, and each wants a gradient.",
            ),
            instead="repair it (--repair), or set parallelism.spmd_backend to partial_dtensor",
            source="torchtitan protocols/module.py (Module._distribute_spmd_types), components/lora.py",
            can_be_repaired=True,
        ),
        RunRule(
            code="NUM008",
            about="gradients of a pipeline",
            must="0.2.2 runs without pipeline parallelism",
            otherwise=_wrong(
                Line.TORCHTITAN_0_2,
                text="every gradient is as many times too large as a step has tokens, SILENTLY: the "
                "gradient norm is wrong, and clipping always cuts.",
            ),
            instead="repair it (--repair), set pipeline_parallel_degree to 1, or take 0.2.1 or 0.3.x",
            source="torchtitan train.py of 0.2.2 (forward_backward_step); "
            "https://github.com/pytorch/torchtitan/issues/2972",
            can_be_repaired=True,
        ),
        RunRule(
            code="NUM009",
            about="gradients under DDP",
            must="0.2.2 shards its parameters over the data ranks (FSDP, HSDP)",
            otherwise=_wrong(
                Line.TORCHTITAN_0_2,
                text="every gradient is divided by the number of replicas, SILENTLY: DDP averages what the "
                "loss has divided by all tokens already.",
            ),
            instead="repair it (--repair), shard the data (data_parallel_shard_degree of 2 or more), or take "
            "0.2.1 or 0.3.x",
            source="torchtitan models/llama3/infra/parallelize.py (apply_ddp) of 0.2.2; "
            "https://github.com/pytorch/torchtitan/pull/2323",
            can_be_repaired=True,
        ),
        RunRule(
            code="NUM010",
            about="gpt-oss's router bias",
            must="the weights of gpt-oss are loaded, not initialized",
            otherwise=_wrong(
                Line.TORCHTITAN_0_2,
                text="the bias of every router's gate is whatever the memory held, SILENTLY: nothing "
                "initializes it.",
            ),
            instead="repair it (--repair), load a checkpoint (checkpoint.initial_load_path), or take 0.3.x",
            source="torchtitan models/moe/moe.py (TokenChoiceTopKRouter.init_weights) of 0.2.x",
            can_be_repaired=True,
        ),
        RunRule(
            code="NUM011",
            about="rotary embedding of the transformers backend",
            must="the transformers backend runs with a transformers whose rotary embedding it initializes",
            otherwise=_wrong(
                Line.SPMD_TYPES,
                Line.DTENSOR,
                text="the frequencies of the rotary embedding are whatever the memory held, SILENTLY: "
                "rope_init_fn, which torchtitan asks for, is gone from transformers 5.",
            ),
            instead="repair it (--repair)",
            source="torchtitan experiments/transformers_modeling_backend/model.py (init_states) of 0.3.0",
            can_be_repaired=True,
        ),
        RunRule(
            code="NUM014",
            about="gradients between stages under TP",
            must="under tensor and sequence parallelism the stages of a pipeline take one sequence at a time "
            "on spmd_types, or there are two stages and the first does no more than embed before its layers",
            otherwise=_wrong(
                Line.SPMD_TYPES,
                text="a gradient is sent with its dims in one order in memory, and taken for one with them "
                "in another by the stage that it is for: SILENTLY, every gradient of the earlier stages is "
                "unrelated to the right one.",
            ),
            instead="repair it (--repair), set parallelism.pipeline_parallel_microbatch_size to 1, or "
            "parallelism.spmd_backend to partial_dtensor",
            source="torch/distributed/pipelining/stage.py of torch 2.15 (_backward_metadata_inference); NCCL "
            "sends memory as it lies, https://github.com/pytorch/pytorch/issues/62283; measured on the CPU, "
            "where tensors are sent in that way",
            can_be_repaired=True,
        ),
        RunRule(
            code="NUM015",
            about="gradients of zero-bubble schedules under FSDP",
            must=f"{_SPLIT_BACKWARD} finds the weights as the forward pass left them: "
            "fsdp_reshard_after_forward is not always, and the loss does not come in chunks",
            otherwise=_wrong(
                *LINES,
                text="the gradients of weights that FSDP has sharded again are not computed, SILENTLY: with "
                "the chunked loss those of the last norm, which is never trained; with "
                "fsdp_reshard_after_forward always those of most layers (80 to 90 % off).",
            ),
            instead="repair it (--repair), or take Interleaved1F1B, or "
            "parallelism.fsdp_reshard_after_forward default and (0.3.x) a loss that is not chunked (its "
            "loss_fn in the place of ChunkedLossWrapper)",
            source="torch/distributed/pipelining/stage.py (backward_one_chunk: the parameters of the stage) "
            "of torch 2.13 and 2.15, torchtitan components/loss.py (ChunkedLossWrapper: lm_head.reshard)",
            can_be_repaired=True,
        ),
        RunRule(
            code="NUM016",
            about="tied weights that nothing shards",
            must="a qwen3 whose embedding and output are tied is sharded, by tensor parallelism or over data",
            otherwise=_wrong(
                Line.TORCHTITAN_0_2,
                text="the embedding and the output are two weights, drawn apart and trained apart, SILENTLY: "
                "moving the model off the meta device unties them.",
            ),
            instead="repair it (--repair), set tensor_parallel_degree to 2, or take 0.2.2 or 0.3.x",
            source="torchtitan models/qwen3/infra/parallelize.py of 0.2.0 and 0.2.1 (the tie), "
            "torch/nn/modules/module.py (_apply); https://github.com/pytorch/torchtitan/issues/2252",
            can_be_repaired=True,
        ),
        RunRule(
            code="CKPT001",
            about="Hugging Face weights of Llama 3",
            must="where Hugging Face weights of Llama 3 are loaded or saved, n_kv_heads is a multiple of "
            "data_parallel_shard_degree x context_parallel_degree x tensor_parallel_degree",
            otherwise=_everywhere(
                "dies as it loads or saves",
                'the adapter permutes the rows of each head, and stops with "Cannot unflatten unevenly '
                'sharded tensor" or "Sharding propagation failed": before the first step '
                "(initial_load_in_hf), or as the weights are saved after the last (last_save_in_hf).",
            ),
            instead="repair it (--repair), move ranks from data_parallel_shard_degree to "
            "data_parallel_replicate_degree, or convert the weights by torchtitan's "
            "scripts/checkpoint_conversion before or after the run",
            source="torchtitan models/llama3/**/state_dict_adapter.py; "
            "https://github.com/pytorch/torchtitan/pull/4797, in no release",
            can_be_repaired=True,
        ),
        RunRule(
            code="CKPT005",
            about="Hugging Face weights of transposed experts",
            must="a run of Llama 4 or Qwen3.5 with experts saves no Hugging Face weights",
            otherwise=_everywhere(
                "dies after the last step",
                "the adapter transposes the weights of the experts, and safetensors refuses to write them: "
                '"You are trying to save a non contiguous tensor", and nothing of the last step is saved.',
            ),
            instead="repair it (--repair), or set checkpoint.last_save_in_hf to false",
            source="torchtitan models/llama4/model/state_dict_adapter.py of 0.2.x, "
            "models/qwen3_5/state_dict_adapter.py of 0.3.0 and main; "
            "https://github.com/pytorch/torchtitan/pull/3514, not merged",
            can_be_repaired=True,
        ),
        RunRule(
            code="CKPT006",
            about="checkpoints of what sees no images",
            must="a run of Qwen3.5 or Kimi that saves its optimizer trains on images, too",
            otherwise=dict.fromkeys(
                (Line.SPMD_TYPES, Line.DTENSOR),
                Otherwise(
                    "cannot be resumed",
                    "on text alone the vision encoder has no gradients, and none of its parameters a state "
                    "in the optimizer, which is saved without them. A run that resumes from such a "
                    'checkpoint dies as it loads: "Missing key in checkpoint state_dict: '
                    'optimizer.state.vision_encoder...".',
                ),
            ),
            instead="repair it (--repair); or go on (--allow CKPT006), and resume without the state of the "
            "optimizer (--checkpoint.exclude_from_loading optimizer)",
            source="torchtitan components/optimizer/utils.py (init_optim_state) of 0.3.0; mended in "
            "https://github.com/pytorch/torchtitan/pull/4474, in no release",
            can_be_repaired=True,
        ),
    )
}
"""Faults of released torchtitan that train wrong, or die, although everything divides."""
