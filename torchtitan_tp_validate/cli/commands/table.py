"""``tp-validate table``: every registered flavor by the TP degrees that work."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.cli import formats, output
from torchtitan_tp_validate.cli.arguments import (
    Parser,
    add_degrees,
    add_output,
    degrees,
    positive,
    tp_degrees,
)
from torchtitan_tp_validate.cli.formats import QUIET, Line, terminal
from torchtitan_tp_validate.cli.memory import add_memory, check_memory, with_memory
from torchtitan_tp_validate.cli.verdicts import Report, Verdicts, unexpected
from torchtitan_tp_validate.degrees import FLAGS, Degrees
from torchtitan_tp_validate.errors import UnavailableError

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = {"TP001": "heads", "TP002": "KV", "TP003": "delta K", "TP004": "delta V", "TP007": "vision"}
_SHARED = "KV shared"
_STYLES = {"model": "bold", _SHARED: "blue", "binding constraint": "yellow"}

_EXAMPLES = """\
examples:
  tp-validate table
  tp-validate table --model llama3 --model qwen3 --tp 1-16
  tp-validate table --all --world-size 64 --output-format markdown
  tp-validate table --model llama3 --world-size 64 --memory 80GiB
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
        action="collect",
        type=tp_degrees,
        metavar="N",
        help=f"the degrees to show (default: {','.join(map(str, _DEFAULT))})",
    )
    parser.add_argument(
        "--world-size", type=positive, metavar="N", help="grey out the degrees that do not divide N ranks"
    )
    add_memory(
        parser,
        more="every flavor out at every degree that works, and what the fullest rank then holds stands in "
        "the place of yes, in GiB of parameters, gradients and optimizer state (Adam), unless it is more",
    )
    add_degrees(parser)
    add_output(parser)
    parser.set_defaults(run=run, parser=parser, command="table")


def run(options: Any) -> int:
    """Run the subcommand; the exit status."""
    check_memory(options)
    options.tp = options.tp or _DEFAULT
    found = list(survey(options))
    table = _Table(options, found)
    if options.output_format == "full" and options.output_file is None and output.uses_color(sys.stdout):
        output.show(matrix(found, options.tp, options.world_size))
        for report in found:
            table.note(report)
    else:
        with formats.writing(options, table) as write:
            for report in found:
                write(report)
    return table.exit_status


class _Table(Verdicts):
    """The verdicts, for people in one table of all."""

    def __init__(self, options: Any, found: Sequence[Report]) -> None:
        super().__init__("table", options.tp)
        self._plain = _plain(found, options.tp, options.world_size)

    def opening(self) -> Iterator[Line]:
        return self._plain

    def full(self, thing: Report) -> Iterator[Line]:
        return iter(())

    def closing(self) -> Iterator[Line]:
        return iter(())


def survey(options: Any) -> Iterator[Report]:
    """Yield a report for every flavor that the options ask for."""
    from torchtitan_tp_validate import registry
    from torchtitan_tp_validate.cli import torchtitan

    choices = [degrees(options, tp) for tp in options.tp]
    with torchtitan.installed(), output.progress("Reading models") as track:
        names = options.model or [n for n in registry.names() if options.all or registry.is_model(n)]
        for name in track(names):
            try:
                flavors = registry.model(name).flavors
            except UnavailableError as error:
                yield Report(name, group=name, note=str(error), skipped=options.model is None)
                continue
            for flavor in flavors:
                report = _in_world(_judged(name, flavor, choices), options.world_size)
                fields = functools.partial(_fields, world_size=options.world_size)
                yield with_memory(report, options, fields, model=name, flavor=flavor)


def _fields(degrees: Degrees, world_size: int) -> dict[str, int]:
    """Return the degrees of a plain run: what they leave of the ranks is shards of the data."""
    named = {FLAGS[axis]: getattr(degrees, axis) for axis in ("tp", "ep", "cp")}
    return {**named, FLAGS["dp_shard"]: world_size // (degrees.tp * degrees.cp)}


def _judged(name: str, flavor: str, choices: Sequence[Degrees]) -> Report:
    """Return the verdict on one flavor, whatever happens: the others are shown all the same."""
    from torchtitan_tp_validate.cli import torchtitan

    try:
        return torchtitan.judge_flavor(name, flavor, choices, listed=True)
    except Exception as error:
        return Report(f"{name} {flavor}", group=name, note=unexpected(error))


def _in_world(report: Report, world_size: int | None) -> Report:
    if world_size is None:
        return report
    judgements = (
        replace(j, in_world=world_size % (j.degrees.tp * j.degrees.cp) == 0) for j in report.judgements
    )
    return replace(report, judgements=tuple(judgements))


def matrix(reports: Sequence[Report], asked: Sequence[int], world_size: int | None) -> Table:
    """Return the table for a terminal, in color."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        title="Tensor parallel degrees that work" + (f" on {world_size} ranks" if world_size else ""),
        title_style="bold",
        caption=Text(_caption(reports, world_size)),
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    headings, rows = _cells(reports, asked)
    for heading in headings:
        style = "cyan" if heading in _HEADINGS.values() else _STYLES.get(heading, "")
        justify: Any = "center" if heading.isdigit() else "right" if style == "cyan" else "left"
        table.add_column(heading, justify=justify, style=style, no_wrap=True)
    previous = None
    for report, names, sizes, behind in rows:
        if previous is not None and report.group != previous:
            table.add_section()
        marks = []
        for judgement in report.judgements:
            style = ("green" if judgement.error is None else "red") if judgement.in_world else "bright_black"
            mark = judgement.state.gib if judgement.state and judgement.error is None else "\u25cf"
            marks.append(Text(mark if judgement.error is None else "\u25cb", style=style))
        group, flavor = map(terminal, names)
        table.add_row(Text("" if report.group == previous else group), Text(flavor), *sizes, *marks, *behind)
        previous = report.group
    return table


def _plain(reports: Sequence[Report], asked: Sequence[int], world_size: int | None) -> Iterator[Line]:
    """Yield the same without color: `yes` where a degree works, `-` where not, brackets outside the world."""
    headings, rows = _cells(reports, asked)
    texts = [headings]
    for report, names, sizes, behind in rows:
        marks = [j.mark for j in report.judgements]
        marks = [m if j.in_world else f"({m})" for m, j in zip(marks, report.judgements, strict=True)]
        texts.append([*names, *sizes, *marks, *behind])
    yield from ((line, "") for line in formats.aligned(texts))
    for report in reports:
        if report.note:
            yield f"{report.status.value.replace('_', ' ')}: {report.name}: {report.note}", QUIET
    if world_size is not None:
        yield f"(yes), (-): the degree does not divide {world_size} ranks.", QUIET


_Row = tuple[Report, list[str], list[str], list[str]]


def _cells(reports: Sequence[Report], asked: Sequence[int]) -> tuple[list[str], list[_Row]]:
    """Return the headings; and of each report that was read its names, its sizes and what is behind them."""
    plans = [(report, report.plan) for report in reports if report.plan is not None]
    present = {dim.code for _, plan in plans for dim in plan.dims}
    codes = [code for code in _HEADINGS if code in present]
    shares = [_SHARED] if any(plan.replication_degrees for _, plan in plans) else []
    rows = []
    for report, plan in plans:
        sizes = [sorted({dim.size for dim in plan.dims if dim.code == code}) for code in codes]
        names = [report.group, report.name.removeprefix(report.group).strip()]
        # The degrees that KV-head replication would add.
        behind = [*(" ".join(map(str, plan.replication_degrees)) for _ in shares), report.binding]
        rows.append((report, names, ["/".join(map(str, size)) for size in sizes], behind))
    names = ["model", "flavor", *(_HEADINGS[code] for code in codes)]
    return [*names, *map(str, asked), *shares, "binding constraint"], rows


def _caption(reports: Sequence[Report], world_size: int | None) -> str:
    lines = [
        "\u25cf works   \u25cb does not"
        + (f"   grey: does not divide {world_size} ranks" if world_size else "")
    ]
    lines += [terminal(f"{report.name}: {report.note}") for report in reports if report.note]
    return "\n".join(lines)
