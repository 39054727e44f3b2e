"""The cases of the truth suite: which tiny models are run, and what about them is broken.

Every size in a tiny model divides by 2 and by 4 until a case says otherwise. All else is as the flavor has
it: what the release trains wrong at any size is repaired, see `rules.FAULTS`.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from torchtitan_tp_validate.rehearsal.cases import HEADS, SEED, Case

PAIRS_PER_LINE = 36
MLA_FAMILIES = ("deepseek_v3", "kimi_k2_7")
"""Latent attention: no KV heads."""


@dataclass(frozen=True)
class Decision:
    """A kind of case that may run equal to TP = 1 and is refused all the same."""

    name: str
    release: str
    reason: str

    def covers(self, release: str, case: Case) -> bool:
        """Return whether this is about the case."""
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


def all_cases(line: ModuleType, spmd_backends: Collection[str | None]) -> list[Case]:
    """Return every case for a line, each once.

    What TP 2 shows is run under every backend of a family, what takes TP 4 under one of them.
    """
    families = (*line.FAMILIES, *line.MORE_FAMILIES)
    cases = [
        case
        for family in families
        for backends in [line.BACKENDS[family]]
        for case in (
            *(case for backend in backends for case in _on_two_ranks(family, line, backend)),
            *_on_four_ranks(family, line, backends),
            *_with_experts(family, line, backends),
            *_random_pairs(family, line, backends, PAIRS_PER_LINE // len(families)),
        )
        if case.spmd_backend in spmd_backends
    ]
    return list({case.key: case for case in cases}.values())


def small_cases(line: ModuleType, spmd_backends: Collection[str | None]) -> list[Case]:
    """Return the cases that two ranks and a few minutes are enough for: one per family and dimension."""
    chosen: dict[tuple[str, str | None, str], Case] = {}
    for case in all_cases(line, spmd_backends):
        if case.world_size == case.tp == 2 and "+" not in case.dimension:
            chosen.setdefault((case.family, case.spmd_backend, case.dimension), case)
    return list(chosen.values())


def _kv_heads(family: str) -> int:
    return HEADS[0] if family in MLA_FAMILIES else HEADS[1]


def _on_two_ranks(family: str, line: ModuleType, backend: str | None) -> Iterator[Case]:
    """Yield a control, and each dimension broken once."""
    kv_heads = _kv_heads(family)
    yield Case(family, "control", 2, n_kv_heads=kv_heads, spmd_backend=backend)
    for variants in _heads(family, line).values():
        yield replace(variants[0], spmd_backend=backend)
    for name in _sizes(family, line):
        odd, _, _ = _BROKEN[name]
        yield Case(family, name, 2, n_kv_heads=kv_heads, sizes=odd, spmd_backend=backend)


def _on_four_ranks(family: str, line: ModuleType, backends: Sequence[str | None]) -> Iterator[Case]:
    """Yield a control per backend; and what four ranks tell apart and two do not, dealt out to the backends.

    That is a dimension that halves but does not quarter, one that leaves a rank without any, and other
    sizes that divide. Of these a line runs one in its ``STRIDE``.
    """
    control = Case(family, "control", 4, n_kv_heads=_kv_heads(family))
    yield from (replace(control, spmd_backend=backend) for backend in backends)
    variants = [replace(control, n_heads=16, n_kv_heads=16)]
    for broken in _heads(family, line).values():
        variants += broken[1:]
    for name in _sizes(family, line):
        _, *sizes = _BROKEN[name]
        if name in _EMPTY_SHARDS:
            sizes.append({name: _EMPTY_SHARDS[name]})
        variants += (replace(control, dimension=name, sizes=broken_size) for broken_size in sizes)
        if name in _DIVISIBLE:
            variants.append(replace(control, sizes={name: _DIVISIBLE[name]}))
    for turn, case in enumerate(variants[:: line.STRIDE]):
        yield replace(case, spmd_backend=backends[turn % len(backends)])


def _with_experts(family: str, line: ModuleType, backends: Sequence[str | None]) -> Iterator[Case]:
    """Expert parallelism, and FSDP over more ranks than experts: two per backend, the others dealt out."""
    if "num_experts" not in line.SIZES[family]:
        return
    control = Case(family, "control", 1, n_kv_heads=_kv_heads(family), dp=2, ep=2)
    uneven = replace(control, dimension="num_experts by EP", sizes={"num_experts": 15})
    for backend in backends:
        yield from (replace(case, spmd_backend=backend) for case in (control, uneven))
    fsdp = "expert_hidden by FSDP"
    variants = [
        replace(control, dimension=fsdp, dp=4, sizes={"num_experts": 2, "expert_hidden": 65}),
        replace(control, tp=2),
        replace(control, dimension="expert_hidden", sizes={"expert_hidden": 65}),
        replace(control, dimension=fsdp, tp=2, ep=1, sizes={"num_experts": 3, "expert_hidden": 66}),
        replace(uneven, tp=2),
        replace(control, dimension=fsdp, dp=4, sizes={"num_experts": 2, "expert_hidden": 66}),
        replace(control, dimension=fsdp, tp=2, ep=1, sizes={"num_experts": 3, "expert_hidden": 68}),
    ]
    if None in backends:
        # Only 0.2.x can split experts over TP besides EP.
        variants += [replace(case, etp=2) for case in variants if case.tp == case.ep == 2]
    for turn, case in enumerate(variants[:: len(backends)]):
        yield replace(case, spmd_backend=backends[turn % len(backends)])


def _heads(family: str, line: ModuleType) -> dict[str, list[Case]]:
    """By dimension, cases whose heads the degree does not divide, one of two ranks first."""
    if family in MLA_FAMILIES:
        counts = ((2, 3), (2, 7), (4, 6), (4, 2), (4, 7))
        return {"n_heads": [Case(family, "n_heads", tp, heads, heads) for tp, heads in counts]}
    by_dimension = {
        "n_kv_heads": ((2, 6, 3), (4, 8, 2), (4, 12, 6), (4, 12, 3)),
        "n_heads": ((2, 3, 3), (4, 6, 6), (4, 6, 2)),
        "one KV head": ((2, 4, 1), (4, 8, 1), (2, 1, 1)),
    }
    cases = {
        name: [Case(family, name, tp, heads, kv_heads) for tp, heads, kv_heads in counts]
        for name, counts in by_dimension.items()
    }
    if "layer1_kv_heads" in line.SIZES[family]:
        cases["layer1_kv_heads"] = [
            Case(family, "layer1_kv_heads", tp, heads, first, {"layer1_kv_heads": second})
            for tp, heads, first, second in ((2, 6, 2, 3), (4, 8, 4, 2), (4, 12, 4, 6))
        ]
    return cases


def _sizes(family: str, line: ModuleType) -> list[str]:
    """Return the family's sizes that are not head counts."""
    return [name for name in line.SIZES[family] if name != "layer1_kv_heads"]


def _random_pairs(
    family: str, line: ModuleType, backends: Sequence[str | None], count: int
) -> Iterator[Case]:
    """Two dimensions at a time at sizes that may or may not divide, the same ones in every run."""
    draw = random.Random(f"{family} {backends[0]}")
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
            backends[number % len(backends)],
            seed=SEED + 1 + number,
        )


def _near(size: int, draw: random.Random) -> int:
    """Return a size that divides by 4 as often as it is only even, or odd."""
    return size + draw.choice((0, 4, 2, 6, 1, 3))
