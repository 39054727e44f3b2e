"""The cases of the truth suite: which tiny models are run, and what about them is broken.

Every size in a tiny model divides by 2 and by 4 until a case says otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

SEED = 20
HEADS = (8, 4)
MLA_FAMILIES = ("deepseek_v3", "kimi_k2_7")
"""Latent attention: no KV heads."""


@dataclass(frozen=True)
class Case:
    """One tiny model at one TP degree.

    Attributes:
        dimension: what the case is about, the row of the report that it counts in.
        sizes: the sizes that are not the line's defaults.
        spmd_backend: torchtitan 0.3.x's backend; None on 0.2.x.
        seed: draws the weights and the tokens.
    """

    family: str
    dimension: str
    tp: int
    n_heads: int = HEADS[0]
    n_kv_heads: int = HEADS[1]
    sizes: Mapping[str, int] = field(default_factory=dict)
    spmd_backend: str | None = None
    seed: int = SEED

    @property
    def key(self) -> str:
        """The case in words, and its identity over runs."""
        sizes = "".join(f" {name}={size}" for name, size in sorted(self.sizes.items()))
        backend = f" {self.spmd_backend}" if self.spmd_backend else ""
        seed = f" seed={self.seed}" if self.seed != SEED else ""
        return f"{self.family}{backend} tp={self.tp} heads={self.n_heads}/{self.n_kv_heads}{sizes}{seed}"

    def as_dict(self) -> dict[str, Any]:
        """The case as JSON data."""
        return {**asdict(self), "sizes": dict(self.sizes)}


@dataclass(frozen=True)
class UpstreamFault:
    """Something that is wrong in torchtitan at every TP degree, and how the cases stay clear of it.

    Attributes:
        release: how the versions that have it begin.
        families: the models that have it; spmd_backends: and under which backends (empty: all).
        reason: what is wrong, and what the cases do about it.
    """

    release: str
    families: tuple[str, ...]
    reason: str
    spmd_backends: tuple[str, ...] = ()


UPSTREAM_FAULTS = (
    UpstreamFault(
        "0.2.",
        ("qwen3_moe", "deepseek_v3", "gpt_oss"),
        "score_before_experts=False (these flavours' own setting) gives the router wrong gradients under TP; "
        "the cases set it to True",
    ),
    UpstreamFault(
        "0.2.",
        ("llama4", "qwen3_moe", "deepseek_v3", "gpt_oss"),
        "expert parallelism with expert_tensor_parallel_degree=1 gives the router wrong gradients under TP; "
        "no case uses it",
    ),
    UpstreamFault(
        "0.3.",
        ("gpt_oss",),
        "the experts' second bias is added once per TP rank when experts are not parallel; it is zero here, "
        "and not trained",
        ("spmd_types",),
    ),
    UpstreamFault(
        "0.3.",
        ("gpt_oss",),
        "the gradient of the attention output's bias is 1/tp of what it should be; it is zero here, and not "
        "trained",
        ("partial_dtensor", "full_dtensor"),
    ),
)


@dataclass(frozen=True)
class Decision:
    """A kind of case that may run equal to TP = 1 and is refused all the same."""

    name: str
    release: str
    reason: str

    def covers(self, release: str, case: Case) -> bool:
        """Whether this is about the case."""
        has_kv_heads = case.family not in MLA_FAMILIES
        return release.startswith(self.release) and has_kv_heads and case.n_kv_heads == 1


DECISIONS = (
    Decision(
        "one KV head",
        "0.2.",
        "a single KV head cannot be split; where it runs, DTensor gathers everything on every rank",
    ),
)

# For each size: odd, 2 modulo 4, 3 modulo 4. Sizes that others depend on are named together.
_BROKEN: dict[str, tuple[dict[str, int], dict[str, int], dict[str, int]]] = {
    "hidden": ({"hidden": 129}, {"hidden": 130}, {"hidden": 131}),
    "shared_hidden": ({"shared_hidden": 129}, {"shared_hidden": 130}, {"shared_hidden": 131}),
    "expert_hidden": ({"expert_hidden": 65}, {"expert_hidden": 66}, {"expert_hidden": 67}),
    "num_experts": ({"num_experts": 15}, {"num_experts": 14}, {"num_experts": 13}),
    "vocab": ({"vocab": 255}, {"vocab": 254}, {"vocab": 253}),
    "seq_len": ({"seq_len": 33}, {"seq_len": 34}, {"seq_len": 35}),
    # A value head belongs to one key head.
    "key_heads": (
        {"key_heads": 3, "value_heads": 12},
        {"key_heads": 6, "value_heads": 12},
        {"key_heads": 2, "value_heads": 4},
    ),
    "value_heads": (
        {"key_heads": 3, "value_heads": 3},
        {"key_heads": 6, "value_heads": 6},
        {"key_heads": 2, "value_heads": 6},
    ),
    "vision_heads": ({"vision_heads": 3}, {"vision_heads": 6}, {"vision_heads": 2}),
    "vision_hidden": ({"vision_hidden": 65}, {"vision_hidden": 66}, {"vision_hidden": 67}),
    "q_lora": ({"q_lora": 33}, {"q_lora": 34}, {"q_lora": 35}),
    "kv_lora": ({"kv_lora": 33}, {"kv_lora": 34}, {"kv_lora": 38}),
    "v_head_dim": ({"v_head_dim": 17}, {"v_head_dim": 18}, {"v_head_dim": 19}),
    "dim": ({"dim": 129}, {"dim": 130}, {"dim": 131}),
}
# The last ranks' shards are empty.
_EMPTY_SHARDS = {"hidden": 5, "shared_hidden": 5, "expert_hidden": 5, "num_experts": 9, "vocab": 9}
_DIVISIBLE = {
    "hidden": 136,
    "shared_hidden": 136,
    "expert_hidden": 72,
    "num_experts": 12,
    "vocab": 252,
    "seq_len": 40,
    "q_lora": 32,
    "kv_lora": 36,
    "v_head_dim": 20,
    "dim": 144,
    "vision_hidden": 72,
}


def all_cases(line: ModuleType, spmd_backends: Sequence[str | None]) -> list[Case]:
    """Every case for a line, each named once."""
    families = (*line.FAMILIES, *getattr(line, "MORE_FAMILIES", ()))
    cases = [
        case
        for backend in spmd_backends
        for family in families
        if backend in _backends(line, family, spmd_backends)
        for case in (
            *_controls(family, line, backend),
            *_heads(family, backend),
            *_sizes(family, line, backend),
            *_random_pairs(family, line, backend),
        )
    ]
    return list({case.key: case for case in cases}.values())


def small_cases(line: ModuleType, spmd_backends: Sequence[str | None]) -> list[Case]:
    """The cases that two ranks and a few minutes are enough for: one per family and dimension."""
    chosen: dict[tuple[str, str | None, str], Case] = {}
    for case in all_cases(line, spmd_backends):
        if case.tp == 2 and "+" not in case.dimension:
            chosen.setdefault((case.family, case.spmd_backend, case.dimension), case)
    return list(chosen.values())


def _backends(line: ModuleType, family: str, chosen: Sequence[str | None]) -> Iterable[str | None]:
    """The backends that a line says the family runs under."""
    supported: Iterable[str | None] = getattr(line, "BACKENDS", {}).get(family, chosen)
    return supported


def _controls(family: str, line: ModuleType, backend: str | None) -> Iterator[Case]:
    """Everything divides: these must be equal to TP = 1, or nothing else here means anything."""
    kv_heads = HEADS[0] if family in MLA_FAMILIES else HEADS[1]
    for tp in (2, 4):
        yield Case(family, "control", tp, n_kv_heads=kv_heads, spmd_backend=backend)
    yield Case(family, "control", 4, 16, 16, spmd_backend=backend)
    for name in line.SIZES[family]:
        if name in _DIVISIBLE:
            sizes = {name: _DIVISIBLE[name]}
            yield Case(family, "control", 4, n_kv_heads=kv_heads, sizes=sizes, spmd_backend=backend)


def _heads(family: str, backend: str | None) -> Iterator[Case]:
    if family in MLA_FAMILIES:
        for tp, heads in ((2, 3), (2, 7), (4, 6), (4, 2), (4, 7)):
            yield Case(family, "n_heads", tp, heads, heads, spmd_backend=backend)
        return
    for tp, heads, kv_heads in ((2, 6, 3), (4, 8, 2), (4, 12, 6), (4, 12, 3)):
        yield Case(family, "n_kv_heads", tp, heads, kv_heads, spmd_backend=backend)
    for tp, heads, kv_heads in ((2, 3, 3), (4, 6, 6), (4, 6, 2)):
        yield Case(family, "n_heads", tp, heads, kv_heads, spmd_backend=backend)
    for tp, heads in ((2, 4), (4, 8), (2, 1)):
        yield Case(family, "one KV head", tp, heads, 1, spmd_backend=backend)


def _sizes(family: str, line: ModuleType, backend: str | None) -> Iterator[Case]:
    known = line.SIZES[family]
    kv_heads = HEADS[0] if family in MLA_FAMILIES else HEADS[1]
    for name in known:
        if name == "layer1_kv_heads":
            for tp, heads, first, second in ((2, 6, 2, 3), (4, 8, 4, 2), (4, 12, 4, 6)):
                yield Case(family, name, tp, heads, first, {name: second}, backend)
            continue
        odd, two, three = _BROKEN[name]
        for tp, sizes in ((2, odd), (4, two), (4, three)):
            yield Case(family, name, tp, n_kv_heads=kv_heads, sizes=sizes, spmd_backend=backend)
        if name in _EMPTY_SHARDS:
            sizes = {name: _EMPTY_SHARDS[name]}
            yield Case(family, name, 4, n_kv_heads=kv_heads, sizes=sizes, spmd_backend=backend)


def _random_pairs(family: str, line: ModuleType, backend: str | None, count: int = 6) -> Iterator[Case]:
    """Two dimensions at a time at sizes that may or may not divide, the same ones in every run."""
    draw = random.Random(f"{family} {backend}")
    # llama3 and llama4 make head_dim of dim and the heads, and cannot rotate an odd one.
    names = [name for name in line.SIZES[family] if name in _DIVISIBLE and name != "dim"]
    for number in range(count):
        chosen = draw.sample(["heads", *names], 2)
        kv_heads = draw.choice((2, 3, 4, 6, 8)) if "heads" in chosen else HEADS[1]
        heads = kv_heads * draw.choice((1, 2)) if "heads" in chosen else HEADS[0]
        yield Case(
            family,
            "+".join(sorted(chosen)),
            draw.choice((2, 4)),
            heads,
            heads if family in MLA_FAMILIES else kv_heads,
            {name: _near(_DIVISIBLE[name], draw) for name in chosen if name != "heads"},
            backend,
            seed=SEED + 1 + number,
        )


def _near(size: int, draw: random.Random) -> int:
    """A size that divides by 4 as often as it is only even, or odd."""
    return size + draw.choice((0, 4, 2, 6, 1, 3))


def from_dict(data: Mapping[str, Any]) -> Case:
    """The case that `Case.as_dict` was of."""
    return Case(**data)
