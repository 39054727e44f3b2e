"""``tp-validate table``: every registered flavor by the TP degrees that work."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.cli import escape, output, reports
from torchtitan_tp_validate.cli.arguments import (
    Parser,
    add_degrees,
    add_output,
    degrees,
    positive,
    tp_degrees,
)
from torchtitan_tp_validate.cli.verdicts import Judgement, Report, exit_status, unexpected
from torchtitan_tp_validate.degrees import Degrees

if TYPE_CHECKING:
    from rich.table import Table

_HEADS = ("TP001", "TP002", "TP003", "TP004", "TP007")
_HEADINGS = {"TP001": "heads", "TP002": "KV", "TP003": "delta K", "TP004": "delta V", "TP007": "vision"}

_SHARED_HEADING = "KV shared"

_EXAMPLES = """\
examples:
  tp-validate table
  tp-validate table --model llama3 --model qwen3 --tp 1-16
  tp-validate table --all --world-size 64 --output-format markdown
"""
_DEFAULT = (2, 4, 8, 16, 32, 64)


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser: Parser = commands.add_parser(
        "table",
        help="show every model of the installed torchtitan by the degrees that work",
        description="Every registered flavor of the installed torchtitan: its head counts, the dimension "
        "that keeps the degree from being doubled, and the TP degrees that work.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--model", action="append", metavar="MODEL", help="only this model; may be repeated")
    parser.add_argument("--all", action="store_true", help="torchtitan's experiments too")
    parser.add_argument(
        "--tp",
        action="collect_degrees",
        type=tp_degrees,
        metavar="N",
        help=f"the degrees to show (default: {','.join(map(str, _DEFAULT))})",
    )
    parser.add_argument(
        "--world-size", type=positive, metavar="N", help="grey out the degrees that do not divide N ranks"
    )
    add_degrees(parser)
    add_output(parser)
    parser.set_defaults(run=run, parser=parser, command="table")


def run(options: Any) -> int:
    """Run the subcommand; the exit status."""
    options.tp = options.tp or _DEFAULT
    found = list(survey(options))
    if options.output_format == "full" and options.output_file is None and output.uses_color(sys.stdout):
        output.show(matrix(found, options.tp, options.world_size))
    else:
        reports.emit(options, found, lambda them: _plain(list(them), options.tp, options.world_size))
    return exit_status(found)


def survey(options: Any) -> Iterator[Report]:
    """A report for every flavor that the options ask for."""
    from torchtitan_tp_validate import registry
    from torchtitan_tp_validate.cli import torchtitan

    choices = [degrees(options, tp) for tp in options.tp]
    with torchtitan.installed(), output.progress("Reading models") as track:
        names = options.model or [n for n in registry.names() if options.all or registry.is_model(n)]
        for name in track(names):
            try:
                flavors = registry.model(name).flavors
            except registry.UnavailableError as error:
                yield Report(name, group=name, note=str(error), skipped=options.model is None)
                continue
            for flavor in flavors:
                yield _in_world(_judged(name, flavor, choices), options.world_size)


def _judged(name: str, flavor: str, choices: Sequence[Degrees]) -> Report:
    """The verdict on one flavor, whatever happens: the others are shown all the same."""
    from torchtitan_tp_validate.cli import torchtitan

    try:
        return torchtitan.judge_flavor(name, flavor, choices, listed=True)
    except Exception as error:
        return Report(f"{name} {flavor}", group=name, note=unexpected(error))


def _in_world(report: Report, world_size: int | None) -> Report:
    if world_size is None:
        return report
    judgements = tuple(
        Judgement(j.degrees, j.error, in_world=world_size % j.degrees.tp == 0) for j in report.judgements
    )
    return Report(**{**vars(report), "judgements": judgements})


def matrix(reports: Sequence[Report], asked: Sequence[int], world_size: int | None) -> Table:
    """The table for a terminal, in color."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = [report for report in reports if report.plan is not None]
    codes = _codes(shown)
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Tensor parallel degrees that work" + (f" on {world_size} ranks" if world_size else ""),
        title_style="bold",
        caption=Text(_caption(reports, world_size)),
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", style="bold", no_wrap=True)
    table.add_column("flavor", no_wrap=True)
    for code in codes:
        table.add_column(_HEADINGS[code], justify="right", style="cyan", no_wrap=True)
    for tp in asked:
        table.add_column(str(tp), justify="center", no_wrap=True)
    shares = any(_shared(report) for report in shown)
    if shares:
        table.add_column(_SHARED_HEADING, style="blue", no_wrap=True)
    table.add_column("binding constraint", style="yellow", no_wrap=True)
    previous = None
    for report in shown:
        if previous is not None and report.group != previous:
            table.add_section()
        marks = []
        for judgement in report.judgements:
            style = ("green" if judgement.error is None else "red") if judgement.in_world else "bright_black"
            marks.append(Text("\u25cf" if judgement.error is None else "\u25cb", style=style))
        group = "" if report.group == previous else report.group
        shared = [_shared(report)] if shares else []
        names = (escape.terminal(group), escape.terminal(_flavor(report)))
        table.add_row(*map(Text, names), *_sizes(report, codes), *marks, *shared, report.binding)
        previous = report.group
    return table


def _plain(reports: Sequence[Report], asked: Sequence[int], world_size: int | None) -> Iterator[output.Line]:
    """The same without color: `yes` where a degree works, `-` where not, brackets outside the world."""
    shown = [report for report in reports if report.plan is not None]
    codes = _codes(shown)
    shares = [_SHARED_HEADING] if any(_shared(report) for report in shown) else []
    headings = [_HEADINGS[code] for code in codes]
    rows = [["model", "flavor", *headings, *map(str, asked), *shares, "binding constraint"]]
    for report in shown:
        marks = ["yes" if j.error is None else "-" for j in report.judgements]
        marks = [m if j.in_world else f"({m})" for m, j in zip(marks, report.judgements, strict=True)]
        shared = [_shared(report) for _ in shares]
        rows.append([report.group, _flavor(report), *_sizes(report, codes), *marks, *shared, report.binding])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), ""
    for report in reports:
        if report.note:
            yield f"{report.status.value.replace('_', ' ')}: {report.name}: {report.note}", "dim"
    if world_size is not None:
        yield f"({'yes'}), (-): the degree does not divide {world_size} ranks.", "dim"


def _caption(reports: Sequence[Report], world_size: int | None) -> str:
    lines = [
        "\u25cf works   \u25cb does not"
        + (f"   grey: does not divide {world_size} ranks" if world_size else "")
    ]
    lines += [escape.terminal(f"{report.name}: {report.note}") for report in reports if report.note]
    return "\n".join(lines)


def _codes(reports: Sequence[Report]) -> list[str]:
    present = {dim.code for report in reports if report.plan for dim in report.plan.dims}
    return [code for code in _HEADS if code in present]


def _sizes(report: Report, codes: Sequence[str]) -> list[str]:
    assert report.plan is not None
    sizes = {code: sorted({d.size for d in report.plan.dims if d.code == code}) for code in codes}
    return ["/".join(map(str, sizes[code])) for code in codes]


def _shared(report: Report) -> str:
    """The degrees that KV-head replication would add."""
    assert report.plan is not None
    return " ".join(map(str, report.plan.replication_degrees))


def _flavor(report: Report) -> str:
    return report.name.removeprefix(report.group).strip()
