"""Why a layout came out as it did: by our rules, by a fault of torchtitan's, or by its own refusal.

A reason says which layouts have it and what is seen of it then. What is seen beside it has to have a reason
of its own, unless the reason is one that everything before it in the model suffers from.

Source: rehearsals of torchtitan 0.2.2 and 0.3.0, with the upstream issue where there is one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torchtitan_tp_validate.rehearsal.truth.layouts import Layout, Row

AGREES = "agrees"
UNEXPLAINED = "unexplained"
_FAULT = "upstream fault"
_REFUSES = "torchtitan refuses"
_NOT_FORESEEN = "not foreseen"
_ROUNDING = "rounding"
_NOT_REHEARSED = "cannot be rehearsed"

KINDS = (AGREES, _FAULT, _REFUSES, _NOT_FORESEEN, _NOT_REHEARSED, _ROUNDING, UNEXPLAINED)
"""What an explanation begins with."""

_ONE_PROCESS = "one process raised"


@dataclass(frozen=True)
class Reason:
    """A reason for what is not as one process computes it.

    Attributes:
        line: of torchtitan, that has it.
        text: what it is, and where upstream has it.
        layouts: whether a layout, of these degrees, has it.
        seen: a pattern of the parameters that are wrong, each with its factor, or of what a rank says.
        spreads: whether everything else may be wrong with them.
        kind: whose it is.
    """

    line: str
    text: str
    layouts: Callable[[Layout, Mapping[str, int]], bool]
    seen: str
    spreads: bool = False
    kind: str = _FAULT


def _experts(layout: Layout) -> bool:
    return any(word in layout.model for word in ("moe", "A3B", "llama4", "deepseek", "gpt_oss", "kimi"))


def _by_ddp(degrees: Mapping[str, int]) -> bool:
    """Whether DDP reduces the gradients, since nothing is sharded over data ranks."""
    return degrees["dp_replicate"] > 1 and degrees["dp_shard"] * degrees["cp"] == 1


REASONS = (
    Reason(
        "0.2",
        "the gradient of the router's gate is not summed over TP ranks, nor is what the experts give back "
        "(upstream issue #1805, mended in #2416)",
        lambda layout, d: d["tp"] > 1 and _experts(layout) and (d["ep"] > 1 or "llama4" not in layout.model),
        r"router\.gate\.|ffn_norm\.weight",
        spreads=True,
    ),
    Reason(
        "0.2",
        "a pipeline's gradients are not divided by the tokens of the global batch (upstream issue #2972)",
        lambda _, d: d["pp"] > 1,
        r" x (32|64|128|256)\.000",
    ),
    Reason(
        "0.2",
        "DDP does not sum the gradients of a stage that computes two microbatches before it goes back: the "
        "last stage alone is right",
        lambda _, d: d["pp"] > 1 and _by_ddp(d),
        r" x \d{2,}\.",
    ),
    Reason(
        "0.2",
        "DDP averages gradients of a loss that is divided by all tokens already (upstream pull request "
        "#2323, mended in #2458)",
        lambda _, d: _by_ddp(d),
        r" x 0\.500",
    ),
    Reason(
        "0.2",
        "DDP never hands gradients to parameters that TP has made DTensors (upstream issue #577, which "
        "llama3 and llama4 refuse)",
        lambda layout, d: "llama" not in layout.model and d["tp"] > 1 and _by_ddp(d),
        r"^gradient norm$|Expected to have finished reduction",
    ),
    Reason(
        "0.2",
        "gpt_oss never initializes the bias of its routers' gates",
        lambda layout, _: "gpt_oss" in layout.model,
        r"^uninitialized .*\.router\.gate\.bias",
    ),
    Reason(
        "0.2",
        "llama4 hands flex attention the masks of all layers: no irope flavor runs",
        lambda layout, _: "irope" in layout.model,
        "'dict' object has no attribute 'mask_mod'",
    ),
    Reason(
        "0.2",
        "the math kernel of a CPU, which is no ring, gives every CP rank the attention of the whole sequence",
        lambda layout, d: d["cp"] > 1 and "llama" not in layout.model,
        "mat1 and mat2 shapes cannot be multiplied",
        kind=_NOT_REHEARSED,
    ),
    Reason(
        "0.3",
        "the second bias of gpt_oss's experts is added on every TP rank (upstream pull request #4245)",
        lambda layout, d: (
            "gpt_oss" in layout.model and layout.backend == "spmd_types" and d["tp"] > 1 and d["ep"] == 1
        ),
        r"\.mlp2_bias",
        spreads=True,
    ),
    Reason(
        "0.3",
        "the bias of gpt_oss's wo is divided by the TP degree in the backward pass too "
        "(ScaledBiasRowwiseLinear, still in main)",
        lambda layout, d: "gpt_oss" in layout.model and layout.backend != "spmd_types" and d["tp"] > 1,
        r"\.attention\.wo\.bias x 0\.(500|250)",
        spreads=True,
    ),
    Reason(
        "0.3",
        "one sequence at a time loses the gradient of what local_map waits for: the routed experts' input "
        "under TP, keys and values under CP (pytorch issue #151240, still in main)",
        lambda layout, d: (
            layout.backend != "spmd_types"
            and layout.batch == "1"
            and (d["cp"] > 1 or (d["tp"] > 1 and d["ep"] == 1 and _experts(layout)))
        ),
        r"\.weight x ",
        spreads=True,
    ),
    Reason(
        "0.3",
        "CP looks at the first attention of every stage: one without a layer dies",
        lambda _, d: d["cp"] > 1 and d["pp"] > 1,
        "IndexError: list index out of range",
    ),
    Reason(
        "0.3",
        "a later stage of muse_glimmer takes the tokens that sequence parallelism has cut for whole ones "
        "(a comment in its forward says so, and that it does not matter)",
        lambda layout, d: (
            "muse_glimmer" in layout.model
            and d["tp"] > 1
            and d["pp"] > 1
            and layout.sequence_parallel == "on"
        ),
        r"\.weight x ",
        spreads=True,
    ),
    Reason(
        "0.3",
        "qwen3_5's stages take two sequences at a time for something else under TP: one sequence, TP alone, "
        "PP alone and partial_dtensor are right (the cause was not found)",
        lambda layout, d: (
            "qwen3_5" in layout.model
            and layout.backend == "spmd_types"
            and layout.batch == "2"
            and d["tp"] > 1
            and d["pp"] > 1
        ),
        r"\.in_proj_",
        spreads=True,
    ),
    Reason(
        "0.3",
        "Adam's first step turns rounding of gradients near zero into steps of the learning rate, which an "
        "epsilon of 1 does not",
        lambda layout, _: "qwen3_5" in layout.model or "muse_glimmer" in layout.model,
        r"\.(A_log|dt_bias|weight) x (1\.0|0\.9)",
        kind=_ROUNDING,
    ),
)

_MESSAGES = (
    ("0.2", r"DDP has not supported > 1D parallelism"),
    ("0.2", r"Mesh '\[.*'fsdp'\]' is not available"),
    ("0.2", r"does not support pipelining"),
    ("0.2", r"shared with a parameter already managed by another FSDP group"),
    ("0.2", r"CP support for gpt-oss model is still in progress"),
    ("0.2", r"Context Parallel only supports SDPA attention"),
    ("0.3", r"Weight tying is not supported with Pipeline Parallel"),
    ("0.3", r"Optimizer param_groups pattern .* matched no parameters"),
    ("0.3", r"spmd_types \+ CP is not supported with ScaledDotProductAttention or VarlenAttention"),
    ("0.3", r"Context Parallel is not yet supported for"),
)
"""Line, and what it says of layouts that it does not take and no rule of ours foresees."""


def count_kinds(line: str, rows: Iterable[Row]) -> list[int]:
    """Return how many rows of a line have an explanation of each of `KINDS`."""
    counts = Counter(explain(line, row).partition(":")[0] for row in rows)
    return [counts[kind] for kind in KINDS]


def explain(line: str, row: Row) -> str:
    """Return why a layout of a line came out as it did, or `UNEXPLAINED`."""
    fits = row.verdict == "fits"
    if row.outcome == "equal":
        return AGREES if fits else UNEXPLAINED
    if not fits and row.outcome in ("dies", "hangs", "differs"):
        return AGREES
    if row.outcome == "differs":
        return _explain_differences(line, row)
    return _explain_end(line, row)


def _explain_differences(line: str, row: Row) -> str:
    wrong = row.wrong.split("; ")
    reasons = [reason for reason in _reasons(line, row.layout) if any(_sees(reason, one) for one in wrong)]
    if any(reason.spreads for reason in reasons) or all(
        any(_sees(reason, one) for reason in reasons) for one in wrong
    ):
        return _told(reasons)
    return UNEXPLAINED


def _explain_end(line: str, row: Row) -> str:
    reasons = [reason for reason in _reasons(line, row.layout) if _sees(reason, row.error)]
    if reasons:
        return _told(reasons)
    if row.error.startswith(_ONE_PROCESS) and "NotImplementedError: " in row.error:
        return f"{_REFUSES}: {row.error.partition('NotImplementedError: ')[2]}"
    for its_line, message in _MESSAGES:
        if its_line == line and re.search(message, row.error):
            return f"{_NOT_FORESEEN}: {row.error.partition(': ')[2]}"
    return UNEXPLAINED


def _reasons(line: str, layout: Layout) -> Iterator[Reason]:
    for reason in REASONS:
        if reason.line == line and reason.layouts(layout, layout.degrees):
            yield reason


def _sees(reason: Reason, text: str) -> bool:
    return re.search(reason.seen, text) is not None


def _told(reasons: list[Reason]) -> str:
    return "; ".join(f"{reason.kind}: {reason.text}" for reason in reasons) or UNEXPLAINED
