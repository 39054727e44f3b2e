"""The layouts of the truth: every mesh of up to four ranks for every family, and every pair of all else.

A layout is one value of each axis of a line. They are chosen by pairwise covering: whatever two values can
stand together do so in one layout at least.
"""

from __future__ import annotations

import csv
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path

from torchtitan_tp_validate.rules import FAULTS

RANKS = 4
DEGREES = ("tp", "ep", "etp", "dp_shard", "dp_replicate", "pp", "cp")
_PLAIN_SCHEDULE = "1F1B"

_DENSE = "dense"
_EXPERTS = "experts"

_FAMILIES = {
    "0.2": {
        "llama3 debugmodel": _DENSE,
        "llama3 8B": _DENSE,
        "llama3 debugmodel n_kv_heads=2": _DENSE,
        "qwen3 debugmodel": _DENSE,
        "qwen3 debugmodel n_kv_heads=4": _DENSE,
        "qwen3 debugmodel_moe": _EXPERTS,
        "qwen3 debugmodel_moe n_kv_heads=2": _EXPERTS,
        "llama4 debugmodel": _EXPERTS,
        "llama4 debugmodel_irope": _EXPERTS,
        "deepseek_v3 debugmodel": _EXPERTS,
        "gpt_oss debugmodel": _EXPERTS,
        "qwen3 30B-A3B": _EXPERTS,
        "deepseek_v3 16B": _EXPERTS,
        "llama4 17bx16e": _EXPERTS,
    },
    "0.3": {
        "llama3 debugmodel": _DENSE,
        "llama3 8B": _DENSE,
        "qwen3 8B": _DENSE,
        "qwen3 debugmodel_non_fused_qkv": _DENSE,
        "muse_glimmer debugmodel": _DENSE,
        "qwen3_5 debugmodel": _DENSE,
        "qwen3 debugmodel_moe": _EXPERTS,
        "qwen3 30B-A3B": _EXPERTS,
        "qwen3_5 debugmodel_moe": _EXPERTS,
        "deepseek_v3 debugmodel": _EXPERTS,
        "kimi_k2_7 debugmodel": _EXPERTS,
        "gpt_oss debugmodel": _EXPERTS,
        "gpt_oss 20b attn_backend=flex": _EXPERTS,
        "deepseek_v3 16B": _EXPERTS,
    },
}
"""Line -> family, flavor and what is set in it -> whether it has experts. KV heads are above TP 4, equal to
it (qwen3 30B-A3B), and below it (muse_glimmer, qwen3_5)."""

_AXES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "0.2": {
        "loss": ("parallel", "whole"),
        "tied": ("no", "yes"),
        "batch": ("2", "1"),
        "schedule": (_PLAIN_SCHEDULE, "Interleaved1F1B"),
        "checkpointing": ("none", "full", "selective"),
    },
    "0.3": {
        "backend": ("spmd_types", "partial_dtensor", "full_dtensor"),
        "loss": ("chunked", "plain"),
        "tied": ("no", "yes"),
        "batch": ("2", "1"),
        "sequence_parallel": ("on", "off"),
        "schedule": (_PLAIN_SCHEDULE, "Interleaved1F1B"),
        "checkpointing": ("none", "full", "selective"),
    },
}
"""Line -> axis -> its values, the plain one first; beside the family and the mesh, which every line has."""


@dataclass(frozen=True)
class Layout:
    """A model, and how it is run.

    Attributes:
        model: name, flavor, and what is set in it.
        mesh: the degrees above 1, as ``tp2 ep2``.
        backend: ``spmd_backend`` of torchtitan 0.3.x.
        loss: ``chunked`` or ``plain`` in 0.3.x; ``parallel`` or ``whole`` over the vocabulary in 0.2.x.
        tied: whether the embedding and the head are.
        batch: sequences that each data rank computes at a time.
        sequence_parallel: of torchtitan 0.3.x.
        schedule: of a pipeline.
        checkpointing: of activations.
    """

    model: str
    mesh: str
    backend: str = ""
    loss: str = ""
    tied: str = "no"
    batch: str = "2"
    sequence_parallel: str = ""
    schedule: str = _PLAIN_SCHEDULE
    checkpointing: str = "none"

    @property
    def degrees(self) -> dict[str, int]:
        """Axis -> degree."""
        named = {word[:-1]: int(word[-1]) for word in self.mesh.split()}
        return {axis: named.get(axis, 1) for axis in DEGREES}

    @property
    def settings(self) -> dict[str, str]:
        """What is set in the model, by name."""
        return dict(word.split("=") for word in self.model.split()[2:])

    @property
    def lora_rank(self) -> int:
        """Of the adapters that linears have, or 0."""
        return int(self.settings.get("lora", 0))

    @property
    def repaired(self) -> tuple[str, ...]:
        """Codes of the faults that it is run without, where the model has another one to show."""
        return tuple(self.settings["repaired"].split("+")) if "repaired" in self.settings else ()

    @property
    def shared_heads(self) -> tuple[int, int] | None:
        """Query and key-value heads where ranks share the latter, see `shared_layouts`."""
        n_heads, _, n_kv_heads = self.settings.get("shared_heads", "").partition("/")
        return (int(n_heads), int(n_kv_heads)) if n_kv_heads else None

    def __str__(self) -> str:
        return ", ".join(filter(None, asdict(self).values()))


_IN_STAGES = partial(Layout, mesh="tp2 pp2", backend="spmd_types", loss="chunked", sequence_parallel="on")
_IN_BUBBLES = partial(Layout, mesh="pp2", backend="spmd_types", loss="plain", sequence_parallel="on")
_I, _V = "InterleavedZeroBubble", "ZBVZeroBubble"
_FURTHER = {
    "0.2": (
        Layout("llama3 debugmodel", "pp2", loss="parallel", schedule=_I),
        Layout("llama3 debugmodel", "pp2", loss="parallel", schedule=_V),
    ),
    "0.3": (
        _IN_STAGES("muse_glimmer debugmodel"),
        _IN_STAGES("muse_glimmer debugmodel", batch="1"),
        _IN_STAGES("llama3 debugmodel"),
        _IN_STAGES("llama3 debugmodel", schedule="Interleaved1F1B"),
        _IN_STAGES("qwen3_5 debugmodel", sequence_parallel="off"),
        _IN_BUBBLES("llama3 debugmodel", schedule=_I),
        _IN_BUBBLES("llama3 debugmodel", schedule=_I, checkpointing="full"),
        _IN_BUBBLES("llama3 debugmodel", schedule=_I, checkpointing="selective"),
        _IN_BUBBLES("llama3 debugmodel", schedule=_I, loss="chunked", backend="partial_dtensor"),
        _IN_BUBBLES("llama3 debugmodel", schedule=_V, loss="chunked"),
        _IN_BUBBLES("llama3 debugmodel", schedule="Interleaved1F1B", loss="chunked"),
        _IN_BUBBLES("llama3 debugmodel compile=aot_eager", schedule=_V),
        _IN_BUBBLES("llama3 debugmodel compile=aot_eager", schedule=_V, checkpointing="full"),
        _IN_BUBBLES("gpt_oss debugmodel", schedule=_V),
        _IN_BUBBLES("gpt_oss debugmodel", schedule=_V, loss="chunked", checkpointing="full"),
        _IN_BUBBLES("llama3 debugmodel", schedule="Interleaved1F1B", checkpointing="selective"),
    ),
}
"""Line -> layouts of a fault that only three values show together, and some a step outside."""

_DDP_TIED = partial(Layout, mesh="dp_replicate2", loss="parallel", tied="yes")
_GPT_OSS = "gpt_oss debugmodel repaired=NUM001+NUM002+NUM010"
_SHOWN = {
    "0.2": (
        Layout(_GPT_OSS, "tp2 ep2 etp2 dp_shard2", loss="parallel"),  # NUM003
        *(_DDP_TIED("qwen3 debugmodel", checkpointing=mode) for mode in ("none", "full")),  # NUM016
        _DDP_TIED("qwen3 debugmodel n_kv_heads=4", batch="1"),
    ),
    "0.3": (
        _IN_STAGES("gpt_oss 20b attn_backend=flex", mesh="tp2", backend="partial_dtensor"),  # NUM005
        _IN_STAGES("qwen3 30B-A3B", mesh="tp2", backend="partial_dtensor", batch="1"),  # NUM006
        _IN_BUBBLES("llama3 debugmodel", schedule=_I, loss="chunked"),  # NUM015
        _IN_BUBBLES("deepseek_v3 debugmodel", mesh="ep2 dp_shard2 pp2", schedule=_I, loss="chunked"),
    ),
}
"""Line -> layouts that show a fault of which the pairs have few. What is one value away is run too."""


def axes_of(line: str) -> dict[str, Sequence[str]]:
    """Return axis -> values of a line (``0.2``, ``0.3``): fields of `Layout`."""
    return {"model": tuple(_FAMILIES[line]), "mesh": tuple(_meshes(line)), **_AXES[line]}


def around(line: str, layout: Layout) -> Iterator[Layout]:
    """Yield a layout, and every possible one that differs from it in one value."""
    yield layout
    for axis, values in axes_of(line).items():
        every = (replace(layout, **{axis: value}) for value in values)
        yield from (one for one in every if one != layout and is_possible(line, one))


def is_possible(line: str, layout: Layout) -> bool:
    """Whether a layout's values go together, and what comes of it is worth the time.

    What torchtitan refuses whatever else is set is shown in one mesh.
    """
    degrees = layout.degrees
    return (
        (degrees["ep"] == 1 or _has_experts(line, layout.model))
        and (degrees["pp"] > 1 or layout.schedule == _PLAIN_SCHEDULE)
        and (degrees["tp"] > 1 or (layout.sequence_parallel != "off" and layout.loss != "whole"))
        and all(layout.mesh == mesh for mesh in _refused(line, layout, degrees))
    )


def _has_experts(line: str, model: str) -> bool:
    kinds = {kind for name, kind in _FAMILIES[line].items() if name.split()[:2] == model.split()[:2]}
    return kinds == {_EXPERTS}


def _refused(line: str, layout: Layout, degrees: Mapping[str, int]) -> Iterator[str]:
    """Yield the mesh that stands for all others of what a layout has and its model is refused."""
    model, flavor, *_ = layout.model.split()
    is_tied = layout.tied == "yes"
    if line == "0.3":
        not_all_backends = {"muse_glimmer": ("spmd_types",)} | dict.fromkeys(
            ("qwen3_5", "kimi_k2_7"), ("spmd_types", "partial_dtensor")
        )
        if layout.backend not in not_all_backends.get(model, (layout.backend,)):
            yield "dp_shard2"
        no_cp = ("qwen3_5 debugmodel", "qwen3_5 debugmodel_moe", "kimi_k2_7 debugmodel", "gpt_oss debugmodel")
        if layout.model in no_cp and degrees["cp"] > 1:
            yield "cp2"
        if is_tied and degrees["pp"] > 1:
            yield "pp2"
    else:
        if model in ("qwen3", "gpt_oss") and degrees["pp"] > 1:
            yield "pp2"
        # Its forward hands flex attention a dict of masks: it does not run at all.
        if "irope" in flavor:
            yield "tp2"
        # gpt_oss has flex attention, which CP refuses; of the others the math kernel of a CPU computes
        # llama's attention alone.
        if model not in ("llama3", "llama4") and degrees["cp"] > 1:
            yield "cp2"
        # Only qwen3 can be tied, and not where FSDP has to look after both.
        if is_tied and (model != "qwen3" or degrees["dp_shard"] * degrees["cp"] > 1):
            yield "dp_shard2" if model == "qwen3" else "never"


def _meshes(line: str) -> Iterator[str]:
    """Yield every mesh of 2 to 4 ranks that is not cut short by its own arithmetic."""
    choices = {"tp": (1, 2, 4), "ep": (1, 2, 4), **dict.fromkeys(DEGREES[3:], (1, 2))}
    for values in itertools.product(*choices.values()):
        degrees = dict(zip(choices, values, strict=True))
        ranks = degrees["dp_replicate"] * degrees["pp"]
        experts = degrees["dp_shard"] * degrees["cp"] * degrees["tp"]
        if 1 < ranks * experts <= RANKS and experts % degrees["ep"] == 0:
            yield " ".join(f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1)
            tp, ep = degrees["tp"], degrees["ep"]
            if line == "0.2" and tp > 1 and ep > 1 and experts % (tp * ep) == 0:
                rest = [f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1][2:]
                yield " ".join([f"tp{tp}", f"ep{ep}", f"etp{tp}", *rest])


@cache
def layouts(line: str) -> tuple[Layout, ...]:
    """Return the layouts of a line, which cover `pairs`."""
    from allpairspy import AllPairs

    axes = axes_of(line)
    order = [field.name for field in fields(Layout) if field.name in axes]

    def may_go_on(values: Sequence[str]) -> bool:
        layout = Layout(**{"mesh": "pp2", **dict(zip(order, values, strict=False))})
        return len(values) < 2 or is_possible(line, layout)

    found = [
        *_FURTHER[line],
        *(
            Layout(**row._asdict())
            for row in AllPairs(OrderedDict((a, axes[a]) for a in order), filter_func=may_go_on)
        ),
    ]
    # The library gives up on a pair whose row it cannot complete at once.
    missing = pairs(line) - {pair for layout in found for pair in pairs_of(layout, axes)}
    for least, layout in itertools.product((8, 5, 3, 2, 1), _possible(line) if missing else ()):
        new = missing & {*pairs_of(layout, axes)}
        if len(new) >= least:
            found.append(layout)
            missing -= new
    found += itertools.chain.from_iterable(around(line, layout) for layout in _SHOWN[line])
    # Full DTensor takes three times as long: what is stopped has more layouts.
    return tuple(dict.fromkeys(sorted(found, key=lambda layout: layout.backend == "full_dtensor")))


def is_of(release: str, layout: Layout) -> bool:
    """Return whether a release can be rehearsed in a layout of its line.

    0.2.0 and 0.2.1 have no gpt_oss among their models, and their context parallelism takes a GPU's kernels.
    """
    return release not in ("0.2.0", "0.2.1") or not (
        layout.degrees["cp"] > 1 or layout.model.startswith("gpt_oss")
    )


NO_FIELDS = ("shared_heads", "lora", "on", "balancer", "compile", "repaired")
"""What is set in the model of a layout besides the fields of its config; see `Layout`, `shared_layouts`."""

Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs_of(layout: Layout, axes: Iterable[str]) -> Iterator[Pair]:
    """Yield every two values of a layout, with their axes."""
    values = asdict(layout)
    yield from itertools.combinations(((axis, values[axis]) for axis in sorted(axes)), 2)


@cache
def pairs(line: str) -> frozenset[Pair]:
    """Return every pair of values of a line that can stand together."""
    axes = axes_of(line)
    return frozenset(pair for layout in _possible(line) for pair in pairs_of(layout, axes))


def _possible(line: str) -> Iterator[Layout]:
    axes = axes_of(line)
    for values in itertools.product(*axes.values()):
        layout = Layout(**dict(zip(axes, values, strict=True)))
        if is_possible(line, layout):
            yield layout


@dataclass(frozen=True)
class Row:
    """A layout, and what came of it.

    Attributes:
        layout: which one.
        verdict: ``fits``, or the codes of the rules that refuse it, or why it was not judged.
        outcome: ``equal``, ``differs``, ``dies``, ``hangs`` or ``not run``.
        worst: the largest relative difference.
        wrong: the likeliest causes: parameter, multiple of the right gradient, what that looks like.
        stage: in which a rank died or hung.
        error: what it said.
        seconds: that it took.
    """

    layout: Layout
    verdict: str
    outcome: str
    worst: str
    wrong: str
    stage: str
    error: str
    seconds: str

    def fields(self) -> dict[str, str]:
        """Return all of it, by column."""
        values = {**asdict(self.layout), **asdict(self)}
        del values["layout"]
        return values


def repaired(row: Row) -> Layout | None:
    """Return a layout without the faults that it is refused for, or None where there is more to it."""
    codes = row.verdict.split()
    if not all(code in FAULTS and FAULTS[code].can_be_repaired for code in codes):
        return None
    every = "+".join(sorted({*row.layout.repaired, *codes}))
    return replace(row.layout, model=f"{stock(row.layout).model} repaired={every}")


def not_repaired(rows: Iterable[Row]) -> list[Row]:
    """Return, of what is refused for known faults alone, the quickest of each model and its faults.

    What has a layout among the rows that is repaired of them is left out.
    """
    rows = list(rows)
    layouts = {row.layout for row in rows}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: float(row.seconds)):
        if repaired(row) is not None:
            groups.setdefault((row.verdict, row.layout.model), []).append(row)
    return [group[0] for group in groups.values() if not any(repaired(row) in layouts for row in group)]


def stock(layout: Layout) -> Layout:
    """Return a layout with all faults that its model has."""
    words = [word for word in layout.model.split() if not word.startswith("repaired=")]
    return replace(layout, model=" ".join(words))


LAYOUT_COLUMNS = tuple(field.name for field in fields(Layout))
COLUMNS = (*LAYOUT_COLUMNS, *(field.name for field in fields(Row)[1:]), "explanation")


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a recorded table."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [_row(values) for values in csv.DictReader(stream)]


def _row(values: Mapping[str, str]) -> Row:
    layout = Layout(**{name: values[name] for name in LAYOUT_COLUMNS})
    return Row(layout, **{field.name: values[field.name] for field in fields(Row)[1:]})


def write_rows(path: Path, explained: Iterable[tuple[Row, str]]) -> None:
    """Write a table, every row with its explanation; whoever is stopped leaves the one that is there."""
    beside = path.with_suffix(".part")
    with beside.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows({**row.fields(), "explanation": why} for row, why in explained)
    beside.replace(path)
