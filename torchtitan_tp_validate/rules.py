"""The rules: every kind of dimension that a mesh axis splits, and what there is to say of it."""

from __future__ import annotations

from dataclasses import dataclass

ALIGNMENT = 8
"""Rows of a grouped matrix product: ``torch._grouped_mm`` wants strides of whole 16 bytes, of bfloat16."""


@dataclass(frozen=True)
class Rule:
    """One kind of dimension that a mesh axis splits.

    Attributes:
        code: stable name, e.g. ``TP002``.
        dim: what torchtitan calls the dimension, e.g. ``n_kv_heads``.
        why: why an uneven split cannot work.
        source: the upstream file or issue that the rule follows.
        axis: the mesh axis that splits it, by its field of ``ParallelDims``.
    """

    code: str
    dim: str
    why: str
    source: str
    axis: str = "tp"


_PARALLELIZE = "torchtitan models/*/parallelize.py; https://github.com/pytorch/torchtitan/issues/2574"
_QWEN3_5 = "torchtitan models/qwen3_5/model.py (Qwen35Model.Config.update_from_config)"
_SHARDING = "torchtitan models/common/decoder_sharding.py"

RULES: dict[str, Rule] = {
    rule.code: rule
    for rule in (
        Rule(
            "TP001",
            "n_heads",
            "wq is split by columns and wo by rows, so that every rank computes whole query heads",
            _PARALLELIZE,
        ),
        Rule(
            "TP002",
            "n_kv_heads",
            "wk and wv are split by columns, so that every rank computes whole key-value heads",
            _PARALLELIZE,
        ),
        Rule(
            "TP003",
            "n_key_heads",
            "the query and key projections of a gated-delta layer are split by whole key heads",
            _QWEN3_5,
        ),
        Rule(
            "TP004",
            "n_value_heads",
            "the value projections of a gated-delta layer are split by whole value heads",
            _QWEN3_5,
        ),
        Rule(
            "TP005",
            "feed_forward_hidden_dim",
            "w1 and w3 are split by columns and w2 by rows, so that every rank has an equal part",
            _SHARDING,
        ),
        Rule(
            "TP006",
            "vocab_size",
            "the embedding and the output projection are split over the vocabulary",
            "torchtitan components/loss.py, models/common/decoder_sharding.py",
        ),
        Rule(
            "TP007",
            "vision_num_heads",
            "the projections of the vision encoder's attention are split by whole heads",
            "torchtitan models/common/vision_encoder_sharding.py",
        ),
        Rule(
            "TP008",
            "vision_hidden_dim",
            "a hidden layer of the vision encoder is split by columns and then by rows",
            "torchtitan models/common/vision_encoder_sharding.py",
        ),
        Rule(
            "TP009",
            "seq_len",
            "the activations between the blocks are split over the sequence",
            "torchtitan models/*/parallelize.py, trainer.py (seq_len_divisor)",
        ),
        Rule(
            "TP010",
            "shared_expert_hidden_dim",
            "w1 and w3 of the shared expert are split by columns and w2 by rows",
            "torchtitan models/common/moe_sharding.py",
        ),
        Rule(
            "TP011",
            "expert_hidden_dim",
            "the hidden dimension of the routed experts is split over the TP axis",
            "torchtitan models/common/moe_sharding.py",
        ),
        Rule(
            "TP012",
            "sharded_dim",
            "the model's own sharding configuration splits it over the TP axis",
            "torchtitan protocols/sharding.py (ShardingConfig.state_shardings)",
        ),
        Rule(
            "TP013",
            "expert_hidden_dim",
            f"the grouped product of routed experts takes rows of whole 16 bytes, {ALIGNMENT} in bfloat16",
            "torch._grouped_mm; torchtitan models/common/moe.py (GroupedExperts), 0.2.x models/moe/moe.py",
        ),
        Rule(
            "TP014",
            "kv_projection_rows",
            "with shared key-value heads wk and wv stay split by rows over all ranks, through a head",
            "torchtitan_tp_validate/kv_replication",
        ),
        Rule(
            "TP015",
            "low_precision_dim",
            "a low-precision product takes whole blocks: every rank's part of a weight is made of them",
            "torchtitan components/quantization/{float8,mx,nvfp4}.py; torchao float8, "
            "prototype/moe_training (MXFP8, NVFP4)",
        ),
        Rule(
            "EP001",
            "num_experts",
            "every rank of the expert parallel axis holds the same number of experts",
            "torchtitan models/common/moe_sharding.py, distributed/expert_parallel.py",
            "ep",
        ),
        Rule(
            "FSDP001",
            "expert_hidden_dim",
            "with more ranks than experts, FSDP cuts the rows of their weights, and only evenly",
            "torchtitan distributed/fsdp.py, 0.2.x models/llama4/infra/parallelize.py (apply_fsdp); "
            "torch/distributed/fsdp/_fully_shard/_fsdp_param.py",
            "dp_shard",
        ),
    )
}
