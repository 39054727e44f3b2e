"""What must divide: the rule codes, the dimensions a plan shards, and the arithmetic of degrees.

A degree is compatible with a plan when every dimension that is split over its mesh axis allows it. Most
dimensions allow exactly the degrees that divide their size, so the compatible tensor parallel (TP)
degrees are divisors of the greatest common divisor of those sizes. Nothing else in this project decides
compatibility.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from fractions import Fraction


class Axis(Enum):
    """A mesh axis that splits dimensions; the value is the ``ParallelDims`` field of its degree."""

    TP = "tp"
    EP = "ep"
    FSDP = "dp_shard"

    @property
    def noun(self) -> str:
        """What people call the degree."""
        return self.flag.capitalize().replace("_", " ")

    @property
    def flag(self) -> str:
        """torchtitan's field of the degree under ``[parallelism]``, in every line."""
        return {
            Axis.TP: "tensor_parallel_degree",
            Axis.EP: "expert_parallel_degree",
            Axis.FSDP: "data_parallel_shard_degree",
        }[self]


class Split(Enum):
    """How a dimension may be cut."""

    EVEN = "even"
    """Every rank gets the same number of units."""
    NOT_EMPTY = "not empty"
    """Shards may differ in size (each is the size over the degree, rounded up), but none is empty."""
    IN_STEP = "in step"
    """A dimension of this size and one of twice it are cut in the same places."""
    SHARED = "shared"
    """Every rank gets the same number of units, or the same number of ranks share each unit."""
    ALIGNED = "aligned"
    """Shards may differ in size, but each is a multiple of `ALIGNMENT`."""

    def problem(self, degree: int | Fraction) -> str:
        """What is wrong with a dimension that ``degree`` ranks cannot share, to follow its size."""
        if self is Split.EVEN:
            return f"is not a multiple of {degree}"
        if self is Split.NOT_EMPTY:
            return f"leaves one of {degree} ranks empty"
        if self is Split.SHARED:
            return f"is neither a multiple nor a divisor of {degree}"
        if self is Split.ALIGNED and degree == 1:
            return f"is not a multiple of {ALIGNMENT}"
        if self is Split.ALIGNED:
            return f"does not give each of {degree} ranks a multiple of {ALIGNMENT}"
        return f"is not cut where its double is, on {degree} ranks"

    def allows(self, size: int, degree: int | Fraction) -> bool:
        """Whether ``degree`` ranks can share ``size`` units this way; there are no fractions of a rank."""
        if degree.denominator != 1:
            return False
        shard = -(-size // degree)
        if self is Split.EVEN:
            return size % degree == 0
        if self is Split.NOT_EMPTY:
            return shard * (degree - 1) < size
        if self is Split.SHARED:
            return size % degree == 0 or degree % size == 0
        if self is Split.ALIGNED:
            # The last shard is what full ones leave, so it is aligned when they and the whole are.
            return size % ALIGNMENT == shard % ALIGNMENT == 0
        return -(-2 * size // degree) == 2 * shard


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
        axis: the mesh axis that splits it.
    """

    code: str
    dim: str
    why: str
    source: str
    axis: Axis = Axis.TP


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
            "EP001",
            "num_experts",
            "every rank of the expert parallel axis holds the same number of experts",
            "torchtitan models/common/moe_sharding.py, distributed/expert_parallel.py",
            Axis.EP,
        ),
        Rule(
            "FSDP001",
            "expert_hidden_dim",
            "with more ranks than experts, FSDP cuts the rows of their weights, and only evenly",
            "torchtitan distributed/fsdp.py, 0.2.x models/llama4/infra/parallelize.py (apply_fsdp); "
            "torch/distributed/fsdp/_fully_shard/_fsdp_param.py",
            Axis.FSDP,
        ),
    )
}


@dataclass(frozen=True)
class Degrees:
    """What a run asks for, as far as it decides what is split and how.

    Attributes:
        tp: tensor parallel degree.
        ep: expert parallel degree.
        cp: context parallel degree.
        etp: degree of tensor parallelism within experts under EP, of torchtitan 0.2.x: 1 or ``tp``.
        dp_shard: how many ranks shard the data and the parameters.
        dp_replicate: how many times they do so.
        fsdp: whether torchtitan's own ``apply_fsdp`` does the sharding, be it over one rank.
        device_type: what the run is for, as torchtitan calls it; without an accelerator that is ``cuda``.
        spmd_backend: ``parallelism.spmd_backend`` of torchtitan 0.3.x.
        seq_len: ``training.seq_len``, in tokens, where it is known.
        sequence_parallel: ``parallelism.enable_sequence_parallel`` of torchtitan 0.3.x.
        replicate_kv_heads: whether several ranks may share a key-value head (``kv_replication``).
    """

    tp: int
    ep: int = 1
    cp: int = 1
    etp: int = 1
    dp_shard: int = 1
    dp_replicate: int = 1
    fsdp: bool = True
    device_type: str = "cuda"
    spmd_backend: str = "spmd_types"
    seq_len: int | None = None
    sequence_parallel: bool = True
    replicate_kv_heads: bool = False

    def of(self, axis: Axis) -> int:
        """The degree of one axis."""
        degree: int = getattr(self, axis.value)
        return degree


@dataclass(frozen=True)
class ShardedDim:
    """A dimension that the plan splits over a mesh axis.

    Attributes:
        code: a key of `RULES`.
        size: the global size, in units that cannot be cut (heads, or rows where there are no heads).
        layers: indices of the layers that have this dimension at this size, ascending.
        consequence: what a run with a degree that it does not allow does.
        silent: whether that run goes on without any error, to wrong results.
        places: where it is, when not in a layer.
        label: its name, where the rule's own says too little.
        split: how it may be cut.
        multiple: how many equal parts every rank's part must have by itself. With expert parallelism, a
            fraction: of the ranks that shard the data, several hold the same experts' shards.
    """

    code: str
    size: int
    layers: tuple[int, ...]
    consequence: str
    silent: bool = False
    places: tuple[str, ...] = ()
    label: str = ""
    split: Split = Split.EVEN
    multiple: int | Fraction = 1

    @property
    def rule(self) -> Rule:
        """The rule behind `code`."""
        return RULES[self.code]

    @property
    def name(self) -> str:
        """Torchtitan's name of the dimension."""
        return self.label or self.rule.dim

    def allows(self, degree: int) -> bool:
        """Whether this many ranks can share it."""
        return self.split.allows(self.size, degree * self.multiple)

    def problem(self, degree: int) -> str:
        """What is wrong when they cannot, to follow its size."""
        return self.split.problem(degree * self.multiple)


@dataclass(frozen=True)
class Plan:
    """Everything that a model's own parallelization splits over the TP and EP axes.

    Attributes:
        model: the name to show people, e.g. ``Qwen3.5-MoE``.
        dims: the sharded dimensions.
        n_layers: the number of layers that the layer indices count.
        how_to_change: template of the advice for this torchtitan line, with ``{flag}`` and ``{degree}``.
        unread: what could not be read; a plan that has any can still prove a degree wrong, never right.
        not_judged: rules that were left out for want of an input, e.g. ``TP009: the run has no seq_len``; the
            verdict holds for the others, and says so.
        shared_kv: what takes the place of n_kv_heads where several ranks may share a key-value head;
            empty where nothing makes that work.
        how_to_replicate: how they are allowed to, in this torchtitan line.
        listed_up_to: the largest TP degree that is listed where no dimension limits it.
    """

    model: str
    dims: tuple[ShardedDim, ...]
    n_layers: int
    how_to_change: str
    unread: tuple[str, ...] = ()
    not_judged: tuple[str, ...] = ()
    shared_kv: tuple[ShardedDim, ...] = ()
    how_to_replicate: str = ""
    listed_up_to: int = 1

    def with_kv_replication(self) -> Plan:
        """The plan when several ranks may share a key-value head; the same one where they cannot."""
        if not self.shared_kv:
            return self
        kept = (dim for dim in self.dims if dim.code not in {shared.code for shared in self.shared_kv})
        return replace(self, dims=(*kept, *self.shared_kv))

    @property
    def replication_degrees(self) -> list[int]:
        """The TP degrees that KV-head replication would add, ascending."""
        return sorted(set(self.with_kv_replication().valid_degrees()) - set(self.valid_degrees()))

    def violations(self, degrees: Degrees) -> tuple[ShardedDim, ...]:
        """The dimensions that do not allow these degrees: the TP axis first, the tightest first."""
        broken = [dim for dim in self.dims if not dim.allows(degrees.of(dim.rule.axis))]
        order = list(Axis)
        return tuple(sorted(broken, key=lambda dim: (order.index(dim.rule.axis), dim.size, dim.code)))

    def valid_degrees(self, axis: Axis = Axis.TP) -> list[int]:
        """Every compatible degree of one axis, ascending.

        There is none where a dimension does not even suit a degree of 1, for another reason than the axis.
        Where none limits the TP degree, those up to `listed_up_to` stand for all.
        """
        dims = [dim for dim in self.dims if dim.rule.axis is axis]
        even = math.gcd(*(dim.size * dim.multiple.denominator for dim in dims if dim.split is Split.EVEN))
        most = max((dim.size for dim in dims), default=self.listed_up_to if axis is Axis.TP else 1)
        candidates = divisors(even) if even else range(1, most + 1)
        return [degree for degree in candidates if all(dim.allows(degree) for dim in dims)]


def divisors(n: int) -> list[int]:
    """The positive divisors of ``n`` > 0, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


@dataclass
class Findings:
    """What a reader has found so far, merged into one `ShardedDim` per kind and size."""

    _dims: dict[tuple[str, str, int, Split, int | Fraction], tuple[set[int], list[str], str, bool]] = field(
        default_factory=dict
    )

    def add(
        self,
        code: str,
        size: int,
        consequence: str,
        *,
        layers: Iterable[int] = (),
        place: str = "",
        label: str = "",
        silent: bool = False,
        split: Split = Split.EVEN,
        multiple: int | Fraction = 1,
    ) -> None:
        """Note a dimension in some layers, or at a place outside all layers."""
        key = (code, label, size, split, multiple)
        known, places, _, _ = self._dims.setdefault(key, (set(), [], consequence, silent))
        known.update(layers)
        if not known and place not in places:
            places.append(place)

    def dims(self) -> tuple[ShardedDim, ...]:
        """The dimensions, in the order they were found."""
        return tuple(
            ShardedDim(
                code, size, tuple(sorted(layers)), consequence, silent, tuple(places), label, split, multiple
            )
            for (code, label, size, split, multiple), (
                layers,
                places,
                consequence,
                silent,
            ) in self._dims.items()
        )


def describe_layers(layers: Sequence[int], n_layers: int) -> str:
    """Which layers, in few words: ``layers 3, 7, ..., 39 (10 of 40)``, ``layers 0-2 (3 of 40)``."""
    count = f"({len(layers)} of {n_layers})"
    if len(layers) == n_layers:
        return "the only layer" if n_layers == 1 else f"all {n_layers} layers"
    if len(layers) == 1:
        return f"layer {layers[0]} {count}"
    contiguous = layers[-1] - layers[0] == len(layers) - 1
    if contiguous and len(layers) > 2:
        return f"layers {layers[0]}-{layers[-1]} {count}"
    if len(layers) > 4:
        return f"layers {layers[0]}, {layers[1]}, ..., {layers[-1]} {count}"
    return f"layers {', '.join(map(str, layers))} {count}"


def describe_places(dim: ShardedDim, n_layers: int) -> str:
    """Where a dimension is, in few words."""
    where = [describe_layers(dim.layers, n_layers)] if dim.layers else []
    return " and ".join((*where, *dim.places))
