"""``tp-validate hf-audit``: output heads that the plans of transformers leave whole on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.cli import formats, output
from torchtitan_tp_validate.cli.arguments import Parser, add_output
from torchtitan_tp_validate.cli.formats import BAD, GOOD, QUIET, Annotation, Findings, Line
from torchtitan_tp_validate.cli.verdicts import unexpected
from torchtitan_tp_validate.errors import TPValidateError
from torchtitan_tp_validate.releases.transformers_plans import transformers_version

if TYPE_CHECKING:
    from torchtitan_tp_validate.transformers_tp.audit import PlanAudit

_EXAMPLES = """\
examples:
  tp-validate hf-audit
  tp-validate hf-audit --class VoxtralForConditionalGeneration --class Lfm2ForCausalLM
  tp-validate hf-audit --fixed --output-format json
"""
SCHEMA_VERSION = 1
"""Of the JSON output; raised when a field changes its meaning or goes."""


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
    from torchtitan_tp_validate.transformers_tp.audit import audited_classes

    if transformers_version() is None:
        options.parser.error("transformers is not installed here: pip install 'torchtitan-tp-validate[hf]'")
    with _fixed(options.fixed), output.progress("Auditing plans") as track:
        names = options.classes or audited_classes()
        found = [_audited(name) for name in track(names)]
    with formats.writing(options, _Classes(found, in_full=options.classes is not None)) as write:
        for one in found:
            write(one)
    if any(one.failed for one in found) or all(one.audit is None for one in found):
        return 2
    return int(any(map(_is_bad, found)))


@dataclass(frozen=True)
class _Class:
    """What the audit made of a class.

    Attributes:
        model: its name.
        audit: of its plan, where an instance of it could be made.
        reason: why there is none.
        failed: whether that is a fault of the audit.
    """

    model: str
    audit: PlanAudit | None = None
    reason: str = ""
    failed: bool = False

    @property
    def cells(self) -> list[str]:
        """A row of the table."""
        if self.audit is None:
            return [self.model, "-", "-", "-", f"not audited: {self.reason}"]
        head = self.audit.head
        if head is None:
            return [self.model, "-", "-", "-", "names no output head"]
        happens = head.consequence if self.audit.rules else "nothing of the model is sharded"
        return [self.model, head.name, head.rule or "-", f"{head.bytes_per_rank:,}", happens or "sharded"]


def _audited(name: str) -> _Class:
    """Return the audit of one class, whatever happens: the others are audited all the same."""
    from torchtitan_tp_validate.transformers_tp.audit import NotAudited, audit_installed

    try:
        (found,) = audit_installed([name])
    except TPValidateError:
        raise
    except Exception as error:
        return _Class(name, reason=unexpected(error), failed=True)
    if isinstance(found, NotAudited):
        return _Class(found.model, reason=found.reason)
    return _Class(found.model, found)


@contextlib.contextmanager
def _fixed(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    from transformers import PreTrainedModel

    from torchtitan_tp_validate.transformers_tp.fix import ensure_lm_head_plan

    with ensure_lm_head_plan(PreTrainedModel):
        yield


def _is_bad(found: _Class) -> bool:
    return found.audit is not None and (found.audit.head_left_whole or found.audit.fails)


class _Classes(Findings[_Class]):
    """What is said of the classes."""

    columns = ("class", "output head", "rule", "bytes per rank", "what happens")

    def __init__(self, found: Sequence[_Class], *, in_full: bool) -> None:
        self._found, self._in_full = found, in_full
        self._audits = [one.audit for one in found if one.audit is not None]

    def opening(self) -> Iterator[Line]:
        if rows := [one.cells for one in self._found if _is_bad(one) or (self._in_full and one.audit)]:
            yield from ((line, "") for line in formats.aligned([self.columns, *rows], right=(3,)))
            yield "", ""
        if self._in_full:
            for audit in self._audits:
                yield from _linears(audit)
        if missed := [one for one in self._found if one.audit is None]:
            yield "Not audited, since no instance could be made:", ""
            yield from ((f"  {one.model}: {one.reason}", QUIET) for one in missed)
        sharded = sum(bool(audit.rules) for audit in self._audits)
        whole = sum(audit.head_left_whole for audit in self._audits)
        fails = sum(audit.fails for audit in self._audits)
        yield (
            f"transformers {transformers_version()}: {len(self._audits)} classes audited, {sharded} with a "
            f"plan; {whole} leave the output head whole, {fails} shard half of a tied pair.",
            BAD if whole or fails else GOOD,
        )

    def line(self, thing: _Class) -> str:
        model, head, rule, size, happens = thing.cells
        if thing.audit is None or thing.audit.head is None:
            return f"{model}: {happens}"
        rule = "no rule" if rule == "-" else f"rule {rule}"
        return f"{model}: {happens}: {head}, {rule}, {size} bytes per rank"

    def annotation(self, thing: _Class) -> Annotation | None:
        level = "error" if thing.failed or _is_bad(thing) else "notice" if thing.audit is None else ""
        return Annotation(level, thing.model, self.line(thing)) if level else None

    def cells(self, thing: _Class) -> list[Line]:
        *cells, happens = thing.cells
        return [*((text, "") for text in cells), (happens, BAD if _is_bad(thing) else "")]

    def document(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "transformers": transformers_version(),
            "head_left_whole": [audit.model for audit in self._audits if audit.head_left_whole],
            "fails": [audit.model for audit in self._audits if audit.fails],
            "audited": [audit.as_dict() for audit in self._audits],
            "not_audited": [
                {"model": one.model, "reason": one.reason} for one in self._found if one.audit is None
            ],
        }


def _linears(audit: PlanAudit) -> Iterator[Line]:
    if not audit.linears:
        return
    yield f"{audit.model} also holds whole on every rank, though its plan shards smaller linears:", ""
    for linear in audit.linears:
        times = f"{linear.count} x " if linear.count > 1 else ""
        shape = " x ".join(map(str, linear.shape))
        yield f"  {linear.name}: {times}({shape}), {linear.bytes_per_rank:,} bytes per rank", ""
    yield "", ""
