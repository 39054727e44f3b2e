"""``tp-validate hf-audit``: output heads that the plans of transformers leave whole on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torchtitan_tp_validate.cli import formats, output
from torchtitan_tp_validate.cli.arguments import Parser, add_output
from torchtitan_tp_validate.cli.formats import Annotation, Findings
from torchtitan_tp_validate.cli.output import BAD, GOOD, QUIET, Line
from torchtitan_tp_validate.cli.verdicts import unexpected
from torchtitan_tp_validate.errors import TPValidateError
from torchtitan_tp_validate.releases.transformers_plans import transformers_version
from torchtitan_tp_validate.transformers_tp.audit import (
    NotAudited,
    PlanAudit,
    audit_installed,
    audited_classes,
)

_EXAMPLES = """\
examples:
  tp-validate hf-audit
  tp-validate hf-audit --class VoxtralForConditionalGeneration --class Lfm2ForCausalLM
  tp-validate hf-audit --fixed --output-format json
"""
SCHEMA_VERSION = 1
"""Of the JSON output; raised when a field changes its meaning or goes."""

_HEADINGS = ["class", "output head", "rule", "bytes per rank", "what happens"]


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser: Parser = commands.add_parser(
        "hf-audit",
        help="name the transformers classes whose plan forgets the output head",
        description="Make an instance of every generating class of the installed transformers on the meta "
        "device, with its default configuration, and name those whose effective tensor parallel plan shards "
        "the model but not its output head. Exit status 1 when there are any.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--class",
        action="append",
        dest="classes",
        metavar="CLASS",
        help="only this class, with all large linears that every rank holds whole; may be repeated",
    )
    parser.add_argument(
        "--fixed", action="store_true", help="audit what install(fix_tp_plan=True) makes of the plans"
    )
    add_output(parser)
    parser.set_defaults(run=run, parser=parser, command="hf-audit")


def run(options: Any) -> int:
    """Run the subcommand; the exit status."""
    if transformers_version() is None:
        options.parser.error("transformers is not installed here: pip install 'torchtitan-tp-validate[hf]'")
    with _fixed(options.fixed), output.progress("Auditing plans") as track:
        names = options.classes or audited_classes()
        results = [result for name in track(names) for result in _audited(name)]
    findings = Findings(
        results,
        full=lambda _: _table(results, in_full=options.classes is not None),
        line=_line,
        annotation=_annotation,
        columns=_HEADINGS,
        cells=_cells,
        document=lambda _: _as_json(results).items(),
    )
    formats.emit(options, findings)
    audits = [result for result in results if isinstance(result, PlanAudit)]
    if not audits or any(isinstance(result, _Failed) for result in results):
        return 2
    return int(any(map(_is_bad, audits)))


class _Failed(NotAudited):
    """A class that the audit stumbled over."""


def _audited(name: str) -> Iterator[PlanAudit | NotAudited]:
    """What `audit_installed` says of one class, whatever happens: the others are audited all the same."""
    try:
        yield from audit_installed([name])
    except TPValidateError:
        raise
    except Exception as error:
        yield _Failed(name, unexpected(error))


@contextlib.contextmanager
def _fixed(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    from transformers import PreTrainedModel

    from torchtitan_tp_validate.transformers_tp.fix import ensure_lm_head_plan

    with ensure_lm_head_plan(PreTrainedModel):
        yield


def _as_json(results: Sequence[PlanAudit | NotAudited]) -> dict[str, Any]:
    audits = [result for result in results if isinstance(result, PlanAudit)]
    return {
        "schema_version": SCHEMA_VERSION,
        "transformers": transformers_version(),
        "head_left_whole": [audit.model for audit in audits if audit.head_left_whole],
        "fails": [audit.model for audit in audits if audit.fails],
        "audited": [audit.as_dict() for audit in audits],
        "not_audited": [vars(result) for result in results if isinstance(result, NotAudited)],
    }


def _table(results: Sequence[PlanAudit | NotAudited], *, in_full: bool) -> Iterator[Line]:
    audits = [result for result in results if isinstance(result, PlanAudit)]
    missed = [result for result in results if isinstance(result, NotAudited)]
    shown = [audit for audit in audits if in_full or _is_bad(audit)]
    if shown:
        yield from _rows(shown)
        yield "", ""
    if in_full:
        for audit in audits:
            yield from _linears(audit)
    if missed:
        yield "Not audited, since no instance could be made:", ""
        yield from ((f"  {result.model}: {result.reason}", QUIET) for result in missed)
    sharded = sum(bool(audit.rules) for audit in audits)
    whole = sum(audit.head_left_whole for audit in audits)
    fails = sum(audit.fails for audit in audits)
    yield (
        f"transformers {transformers_version()}: {len(audits)} classes audited, {sharded} with a plan; "
        f"{whole} leave the output head whole, {fails} shard half of a tied pair.",
        BAD if whole or fails else GOOD,
    )


def _rows(audits: Sequence[PlanAudit]) -> Iterator[Line]:
    rows = [_HEADINGS, *map(_row, audits)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(w) if i == 3 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip(), ""


def _row(audit: PlanAudit) -> list[str]:
    head = audit.head
    if head is None:
        return [audit.model, "-", "-", "-", "names no output head"]
    happens = head.consequence if audit.rules else "nothing of the model is sharded"
    return [audit.model, head.name, head.rule or "-", f"{head.bytes_per_rank:,}", happens or "sharded"]


def _line(result: PlanAudit | NotAudited) -> str:
    if isinstance(result, NotAudited):
        return f"{result.model}: not audited: {result.reason}"
    model, head, _, size, happens = _row(result)
    if result.head is None:
        return f"{model}: {happens}"
    rule = f"rule {result.head.rule}" if result.head.rule else "no rule"
    return f"{model}: {happens}: {head}, {rule}, {size} bytes per rank"


def _annotation(result: PlanAudit | NotAudited) -> Annotation | None:
    if isinstance(result, NotAudited):
        return Annotation("error" if isinstance(result, _Failed) else "notice", result.model, _line(result))
    return Annotation("error", result.model, _line(result)) if _is_bad(result) else None


def _cells(result: PlanAudit | NotAudited) -> list[Line]:
    if isinstance(result, NotAudited):
        return [(text, "") for text in (result.model, "-", "-", "-", f"not audited: {result.reason}")]
    *cells, happens = _row(result)
    return [*((text, "") for text in cells), (happens, BAD if _is_bad(result) else "")]


def _is_bad(audit: PlanAudit) -> bool:
    return audit.head_left_whole or audit.fails


def _linears(audit: PlanAudit) -> Iterator[Line]:
    if not audit.linears:
        return
    yield f"{audit.model} also holds whole on every rank, though its plan shards smaller linears:", ""
    for linear in audit.linears:
        times = f"{linear.count} x " if linear.count > 1 else ""
        shape = " x ".join(map(str, linear.shape))
        yield f"  {linear.name}: {times}({shape}), {linear.bytes_per_rank:,} bytes per rank", ""
    yield "", ""
