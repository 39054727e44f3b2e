"""Compare verdicts with the truth: a confusion matrix, as text, CSV and Markdown."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torchtitan_tp_validate.rehearsal.reports import CRASH, DIFFERENT, EXCEPTION, HANG, INVALID, UNSTABLE
from torchtitan_tp_validate.rehearsal.runner import Result
from torchtitan_tp_validate.rehearsal.truth.cases import DECISIONS

AGREED = "agreed"
FALSE_REFUSAL = "false refusal"
MISS = "miss"
NOT_VALIDATED = "not validated"
BY_DECISION = "refused by decision"
JUDGEMENTS = (AGREED, FALSE_REFUSAL, MISS, NOT_VALIDATED, BY_DECISION, UNSTABLE, INVALID)

_WRONG = (EXCEPTION, HANG, CRASH, DIFFERENT)


def judgement(result: Result) -> str:
    """Return what our verdict is worth in the light of the real run.

    ``invalid`` is a case that fails at TP = 1 too: it says nothing about tensor parallelism.
    """
    if result.truth in (INVALID, UNSTABLE):
        return result.truth
    if result.verdict not in ("compatible", "refused"):
        return NOT_VALIDATED
    if result.truth in _WRONG:
        return AGREED if result.verdict == "refused" else MISS
    if result.verdict == "compatible":
        return AGREED
    return BY_DECISION if _decided(result) else FALSE_REFUSAL


def _decided(result: Result) -> bool:
    release = result.versions.get("torchtitan", "")
    return any(decision.covers(release, result.case) for decision in DECISIONS)


def matrix(results: Iterable[Result], row: Callable[[Result], str]) -> dict[str, Counter[str]]:
    """Count the results of each judgement in each row; the last row is all of them."""
    rows: dict[str, Counter[str]] = {}
    everything: Counter[str] = Counter()
    for result in results:
        rows.setdefault(row(result), Counter())[judgement(result)] += 1
        everything[judgement(result)] += 1
    return {**dict(sorted(rows.items())), "all": everything}


def by_family(result: Result) -> str:
    """Return the matrix row: the family, and its backend where there is a choice."""
    return " ".join(filter(None, (result.case.family, result.case.spmd_backend)))


def by_dimension(result: Result) -> str:
    """Return the matrix row: what was broken; pairs are one row."""
    return "two at random" if "+" in result.case.dimension else result.case.dimension


def as_text(results: Sequence[Result]) -> str:
    """Return both matrices for a terminal, and every case that our verdict got wrong."""
    parts = [_aligned(table) for table in _tables(results)]
    for name in (FALSE_REFUSAL, MISS, NOT_VALIDATED, UNSTABLE):
        lines = [f"  {r.case.key}: {r.truth} ({r.detail})" for r in results if judgement(r) == name]
        if lines:
            parts.append("\n".join([f"{name}:", *lines]))
    return "\n\n".join(parts)


def write(results: Sequence[Result], out: Path, versions: Mapping[str, str]) -> tuple[Path, Path]:
    """Write ``truth-<torchtitan version>.csv`` and ``.md``."""
    stem = f"truth-{versions['torchtitan']}"
    ordered = sorted(results, key=lambda r: (r.case.family, r.case.spmd_backend or "", r.case.key))
    table, text = out / f"{stem}.csv", out / f"{stem}.md"
    _write_csv(ordered, table)
    text.write_text(_markdown(ordered, versions), encoding="utf-8")
    return table, text


def _write_csv(results: Sequence[Result], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        header = (
            "family backend dimension tp dp ep etp n_heads n_kv_heads sizes seed verdict codes truth stage"
        )
        rows.writerow([*header.split(), "judgement", "detail", "seconds"])
        for r in results:
            sizes = " ".join(f"{name}={size}" for name, size in sorted(r.case.sizes.items()))
            degrees = (r.case.tp, r.case.dp, r.case.ep, r.case.etp)
            model = (*degrees, r.case.n_heads, r.case.n_kv_heads, sizes, r.case.seed)
            ended = (
                r.verdict,
                " ".join(sorted(r.codes)),
                r.truth,
                r.stage,
                judgement(r),
                r.detail,
                r.seconds,
            )
            rows.writerow([r.case.family, r.case.spmd_backend or "", r.case.dimension, *model, *ended])


def _markdown(results: Sequence[Result], versions: Mapping[str, str]) -> str:
    counted = sum(judgement(r) != INVALID for r in results)
    parts = [
        f"# Truth suite: torchtitan {versions['torchtitan']}",
        f"{counted} cases, with {', '.join(f'{name} {number}' for name, number in versions.items())}. "
        "Each is a tiny model trained for two steps with and without tensor parallelism from the same "
        "weights; the verdict is right when it refuses exactly the runs that fail, hang or come out "
        "different. What the release trains wrong at any size (docs/faults.md) is repaired.",
    ]
    parts += [_piped(table) for table in _tables(results)]
    for name in (FALSE_REFUSAL, MISS, NOT_VALIDATED, UNSTABLE, BY_DECISION, INVALID):
        chosen = [r for r in results if judgement(r) == name]
        if chosen:
            parts.append(f"## {name.capitalize()}\n\n" + "\n".join(_bullet(r) for r in chosen))
    if decisions := _decisions(versions["torchtitan"]):
        parts.append("## Why they are refused by decision\n\n" + "\n".join(decisions))
    return "\n\n".join(parts) + "\n"


def _bullet(result: Result) -> str:
    codes = f" ({' '.join(sorted(result.codes))})" if result.codes else ""
    detail = result.detail.replace("`", "'")
    return f"- {result.case.key}: {result.verdict or 'no verdict'}{codes}; {result.truth}: `{detail}`"


def _decisions(release: str) -> list[str]:
    """Return what is refused although it may run, and why."""
    return [
        f"- {decision.name}: {decision.reason}."
        for decision in DECISIONS
        if release.startswith(decision.release)
    ]


def _tables(results: Sequence[Result]) -> list[list[list[str]]]:
    tables = []
    for title, row in (("family", by_family), ("dimension", by_dimension)):
        rows = matrix(results, row)
        used = [j for j in JUDGEMENTS if rows["all"][j] or j in (AGREED, FALSE_REFUSAL, MISS)]
        header = [title, "cases", *used]
        body = [
            [name, str(counts.total() - counts[INVALID]), *(str(counts[j]) for j in used)]
            for name, counts in rows.items()
        ]
        tables.append([header, *body])
    return tables


def _aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for name, *counts in table:
        cells = (cell.rjust(width) for cell, width in zip(counts, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _piped(table: Sequence[Sequence[str]]) -> str:
    header, *body = table
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body))
