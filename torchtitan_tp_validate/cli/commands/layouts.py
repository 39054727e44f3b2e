"""``tp-validate layouts``: the layouts of a run that work on a number of ranks."""

from __future__ import annotations

import itertools
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.cli import formats, output
from torchtitan_tp_validate.cli.arguments import (
    Parser,
    add_output,
    add_repairs,
    add_replication,
    positive,
    run_options,
)
from torchtitan_tp_validate.cli.formats import BAD, GOOD, QUIET, Findings, Format, Line
from torchtitan_tp_validate.cli.memory import MEMORY, add_memory
from torchtitan_tp_validate.cli.picture import Bar, Column, svg

if TYPE_CHECKING:
    from torchtitan_tp_validate.rehearsal.memory import LayoutMeter, Sent, State, Traffic
    from torchtitan_tp_validate.search import Layout, Search

FORMS = ("cli", "toml", "recipe")
"""Of what ``--emit`` writes; `cli.emit` does."""

SCHEMA_VERSION = 1
"""Of the JSON output, which ``cli/schema-layouts.json`` describes."""

_MIB = 2**20
_CODE = len("NODE001")
_STEP = "GiB in a step"
_EXAMPLES = """\
examples:
  tp-validate layouts --world-size 64 -- --module qwen3_5 --config qwen35_122b_a10b
  tp-validate layouts --world-size 64 --gpus-per-node 8 --memory 80GiB -- --module qwen3_5 ...
  tp-validate layouts --world-size 16 --near -- --module llama3 --config llama3_8b ...
  tp-validate layouts --world-size 64 --gpus-per-node 8 --traffic --limit 3 -- --module llama3 ...
  tp-validate layouts --world-size 32 --keep cp,pp -- --job.config_file llama3_70b.toml
  tp-validate layouts --world-size 64 --emit recipe --output-file on_64.py -- --module llama3 ...
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser: Parser = commands.add_parser(
        "layouts",
        help="list the layouts of a run that work on a number of ranks",
        description="List the layouts of a run that work on a number of ranks: those with the fewest "
        "pipeline stages first, then context, tensor and expert parallel ranks, then replicas. Each is "
        "judged as the launcher judges a run. Exit status 0 when there is one, 1 when there is none.",
        epilog=_EXAMPLES,
        usage="tp-validate layouts --world-size N [options] -- TORCHTITAN'S ARGUMENTS",
    )
    ranks = parser.add_argument_group("of the ranks")
    ranks.add_argument("--world-size", type=positive, action="once", metavar="N", help="how many there are")
    ranks.add_argument(
        "--gpus-per-node",
        type=positive,
        action="once",
        metavar="N",
        help="how many of them share a node: layouts whose TP or EP crosses nodes come last, and say so",
    )
    add_memory(
        ranks,
        more="every layout out without memory, and those whose parameters, gradients and optimizer state "
        "(Adam) alone take more are left out",
    )
    ranks.add_argument(
        "--traffic",
        action="store_true",
        help="tell what a rank sends in a step, by axis, and what the step itself holds at the least: "
        "torchtitan's own step is followed on tensors without memory, which takes a minute or more for each "
        "layout",
    )
    wanted = parser.add_argument_group("which layouts")
    wanted.add_argument(
        "--limit", type=positive, default=10, metavar="N", help="how many to list at most (default: 10)"
    )
    wanted.add_argument(
        "--keep",
        type=_axes,
        action="collect",
        metavar="AXIS",
        help="keep the run's own degree of an axis: cp, or cp,pp",
    )
    wanted.add_argument(
        "--near", action="store_true", help="list those first that change the fewest degrees of the run"
    )
    add_repairs(wanted)
    add_replication(wanted)
    add_output(parser, more=_Layouts.formats)
    parser.add_argument(
        "--emit",
        choices=FORMS,
        action="once",
        help="write the first of them down in place of the list: as torchtitan's arguments, as a TOML file "
        "of 0.2.x, or as a module with a config function of 0.3.x",
    )
    parser.set_defaults(run=run, parser=parser, command="layouts", hint="a run's arguments follow --")


def _axes(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def run(options: Any) -> int:
    """Run the subcommand; the exit status."""
    if options.torchtitan_arguments is None:
        options.parser.error("which run? give torchtitan's arguments after --")
    if options.world_size is None:
        options.parser.error("--world-size is missing: how many ranks are there?")
    if options.emit and options.output_format != next(iter(formats.FORMATS)):
        options.parser.error("--emit writes no list: leave --output-format out")
    if options.output_format == "svg" and options.memory is None and not options.traffic:
        options.parser.error("--output-format svg draws what --memory and --traffic tell: give one of them")
    from torchtitan_tp_validate.cli import torchtitan

    with output.status() as progress, ExitStack() as stack:
        progress("reading the run")
        meter = None
        if options.memory is not None or options.traffic:
            from torchtitan_tp_validate.rehearsal.memory import layout_meter

            # Its process imports torchtitan, too: both do so at once.
            meter = stack.enter_context(
                layout_meter(options.torchtitan_arguments, replicate_kv_heads=options.replicate_kv_heads)
            )
        with torchtitan.installed():
            if options.emit:
                from torchtitan_tp_validate.cli import emit

                emit.raise_if_not_read(options.emit)
            search, name = torchtitan.search_layouts(
                options.torchtitan_arguments, run_options(options), options.keep or (), near=options.near
            )
        fitting = _fitting(search, meter, options, progress)
        found: Iterator[Found] = itertools.islice(fitting, options.limit)
        if options.emit:
            return _emit(next(_aside(found), None), search, options)
        if options.traffic:
            found = _followed(found, search, meter, options, progress)
        layouts = _Layouts(search, name, options)
        with formats.writing(options, layouts) as write:
            for one in _aside(found):
                write(one)
    return 0 if layouts.written else 1


def _emit(found: Found | None, search: Search, options: Any) -> int:
    """Write a layout down; return the exit status."""
    from torchtitan_tp_validate.cli import emit, torchtitan

    if found is None:
        sys.stderr.write(
            "tp-validate: no layout works, so that there is nothing to write; without --emit the "
        )
        sys.stderr.write("rules that exclude them are counted.\n")
        return 1
    flags = ["--replicate-kv-heads"] if options.replicate_kv_heads else []
    flags += ["--repair"] if found.layout.repairs else []
    flags += ["--allow", ",".join(options.allow)] if options.allow else []
    with torchtitan.installed(), _no_warnings():
        text = emit.emitted(options.emit, options.torchtitan_arguments, search, found.layout, flags)
    with formats.place(options.output_file) as put:
        put([text])
    return 0


def _aside(found: Iterator[Found]) -> Iterator[Found]:
    """Yield what is found, and keep off what torchtitan says each time that it is asked."""
    from torchtitan_tp_validate.cli import torchtitan

    while True:
        with torchtitan.installed(), _no_warnings():
            one = next(found, None)
        if one is None:
            return
        yield one


@contextmanager
def _no_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@dataclass(frozen=True)
class Found:
    """A layout that works.

    Attributes:
        layout: its degrees.
        state: what its fullest rank holds, where that was asked for.
        traffic: what its ranks send and take in a step, where that was asked for.
        memory: what a rank has, where that is known.
    """

    layout: Layout
    state: State | None = None
    traffic: Traffic | None = None
    memory: int | None = None

    @property
    def told(self) -> list[str]:
        """The codes of what is told, and excludes nothing: that a step takes more than there is, too."""
        codes = list(dict.fromkeys(problem.code for problem in self.layout.warnings))
        if self.state is not None and self.traffic is not None and self.memory is not None:
            codes += [MEMORY] if self.traffic.taken > self.memory else []
        return codes


def _fitting(search: Search, meter: LayoutMeter | None, options: Any, progress: Any) -> Iterator[Found]:
    """Yield the layouts that work and fit the memory, best first."""
    for index, layout in enumerate(search.confirmed()):
        if meter is None or options.memory is None:
            yield Found(layout)
            continue
        progress(f"laying out layout {index + 1}")
        sharing = options.world_size // layout.of("dp_replicate")
        # No layout holds less than an even part of the whole.
        state = None
        if meter.whole.total <= sharing * options.memory:
            state = meter.measure(search.fields(layout), options.world_size)
        if state is None or state.total > options.memory:
            search.excluded[MEMORY] += 1
        else:
            yield Found(layout, state, memory=options.memory)


def _followed(
    found: Iterator[Found], search: Search, meter: LayoutMeter | None, options: Any, progress: Any
) -> Iterator[Found]:
    """Yield the same with what is sent in a step."""
    assert meter is not None
    for index, one in enumerate(found):
        progress(f"following a step of layout {index + 1}")
        yield replace(one, traffic=meter.follow_step(search.fields(one.layout), options.world_size))


def _picture(findings: Findings[Found]) -> Iterator[str]:
    assert isinstance(findings, _Layouts)
    return findings.picture()


def _gather(findings: Findings[Found], thing: Found) -> Iterable[str]:
    assert isinstance(findings, _Layouts)
    findings.shown.append(thing)
    return ()


class _Layouts(Findings[Found]):
    """What is said of layouts.

    Attributes:
        shown: those of a picture, which is drawn when all are there.
    """

    array = "layouts"
    formats = MappingProxyType(
        {"svg": Format(_gather, "a picture of --memory and --traffic", lambda _: (), _picture)}
    )

    def __init__(self, search: Search, name: str, options: Any) -> None:
        self._search, self._name, self._options = search, name, options
        state = ["GiB per rank"] if options.memory is not None else []
        step, traffic = ([_STEP], ["sent by a rank in a step"]) if options.traffic else ([], [])
        self.columns = (*search.axes, *state, *step, "told", "repairs", *traffic)
        self._first: Found | None = None
        self._uncounted: dict[str, None] = {}
        self.shown: list[Found] = []

    def picture(self) -> Iterator[str]:
        """Yield what is drawn: a row for each layout, of what its ranks hold and send."""
        columns = []
        states = [one.state for one in self.shown if one.state is not None]
        if states:
            held = [Bar(tuple((name, size / 2**30) for name, size in asdict(one).items())) for one in states]
            columns.append(Column("held by the fullest rank", "GiB", held))
        if any(one.traffic is not None for one in self.shown):
            sent = [self._sent_bar(one.traffic) for one in self.shown if one.traffic is not None]
            columns.append(Column("sent by a rank in a step", "MiB", sent))
        title = f"{self._name} on {self._options.world_size} ranks"
        return svg(title, [self._degrees(one.layout) for one in self.shown], columns)

    def _sent_bar(self, traffic: Traffic) -> Bar:
        if traffic.uncounted:
            return Bar(instead="not counted")
        return Bar(
            tuple((_named(axes, across), count / _MIB) for axes, across, count in self._by_axes(traffic.sent))
        )

    def _degrees(self, layout: Layout) -> str:
        degrees = [f"{axis} {layout.of(axis)}" for axis in self._search.axes if layout.of(axis) > 1]
        return ", ".join(degrees) or "one rank"

    def opening(self) -> Iterator[Line]:
        yield f"{self._name} on {self._options.world_size} ranks:", "bold"
        yield "", ""

    def full(self, thing: Found) -> Iterator[Line]:
        if thing.traffic is not None and thing.traffic.uncounted:
            self._uncounted[thing.traffic.uncounted] = None
        if self._first is None:
            self._first = thing
            yield self._aligned(list(self.columns)), "bold"
        yield self._aligned([text for text, _ in self.cells(thing)]), ""

    def _aligned(self, cells: list[str]) -> str:
        numbers, (told, repairs, *traffic) = cells[: self._numbers], cells[self._numbers :]
        aligned = [cell.rjust(len(column)) for cell, column in zip(numbers, self.columns, strict=False)]
        return "  ".join((*aligned, told.ljust(_CODE), repairs.ljust(len("repairs")), *traffic)).rstrip()

    @property
    def _numbers(self) -> int:
        return self.columns.index("told")

    def closing(self) -> Iterator[Line]:
        if self._first is None:
            yield "No layout works.", BAD
        else:
            arguments = self._search.arguments(self._first.layout)
            yield "", ""
            change = " ".join(arguments) or "as it is"
            yield f"The first is the run with: {change}", GOOD
        for reason in self._uncounted:
            yield f"Not counted: {reason}", BAD
        yield "", ""
        yield f"{self._search.considered} layouts are there; {self._left}.", QUIET
        if self._search.excluded:
            yield f"Excluded, by each rule that a layout breaks: {self._excluded}.", QUIET

    @property
    def _left(self) -> str:
        left = len(self._search.candidates)
        return f"arithmetic leaves {left}, of which {self._search.judged} were judged in full for this list"

    @property
    def _excluded(self) -> str:
        counts = sorted(self._search.excluded.items(), key=lambda counted: (-counted[1], counted[0]))
        return ", ".join(f"{code} {count}" for code, count in counts)

    def line(self, thing: Found) -> str:
        layout = thing.layout
        memory = [f"{thing.state.gib} GiB per rank"] if thing.state else []
        if thing.traffic is not None and not thing.traffic.uncounted:
            memory.append(f"{thing.traffic.gib} {_STEP}")
        state = f": {', '.join(memory)}" if memory else ""
        told = "".join(f" ({code})" for code in thing.told)
        sent = f"; {self._sent(thing.traffic)}" if thing.traffic is not None else ""
        return f"{self._degrees(layout)}{state}{told}{sent}"

    def _sent(self, traffic: Traffic) -> str:
        """Return what is sent, in a few words."""
        if traffic.uncounted:
            return "not counted"
        parts = [
            f"{_named(axes, False)} {count / _MIB:.2f} MiB{' across nodes' if across else ''}"
            for axes, across, count in self._by_axes(traffic.sent)
        ]
        return ", ".join(parts) or "nothing"

    def _by_axes(self, sent: Iterable[Sent]) -> list[tuple[tuple[str, ...], bool | None, int]]:
        """Return the axes, whether their ranks are on several nodes, where that is known, and the bytes.

        Those of the rank that sends the most there: the stages of a pipeline differ.
        """
        per_node = self._options.gpus_per_node
        of_ranks: Counter[tuple[int, tuple[tuple[str, ...], bool | None]]] = Counter()
        for one in sent:
            across = None if per_node is None else one.spans_nodes(per_node)
            of_ranks[one.rank, (one.axes, across)] += one.bytes
        counts: dict[tuple[tuple[str, ...], bool | None], int] = {}
        for (_, key), count in of_ranks.items():
            counts[key] = max(counts.get(key, 0), count)
        return sorted(((*key, count) for key, count in counts.items()), key=lambda one: (-one[2], one[0]))

    def cells(self, thing: Found) -> list[Line]:
        layout = thing.layout
        cells = [(str(layout.of(axis)), "") for axis in self._search.axes]
        if thing.state is not None:
            cells.append((thing.state.gib, ""))
        if thing.traffic is not None:
            cells.append(("-" if thing.traffic.uncounted else thing.traffic.gib, ""))
        traffic = [(self._sent(thing.traffic), "")] if thing.traffic is not None else []
        return [*cells, (", ".join(thing.told), ""), (", ".join(layout.repairs), ""), *traffic]

    def document(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "run": self._name,
            "world_size": self._options.world_size,
        }

    def item(self, thing: Found) -> dict[str, Any]:
        layout, state, traffic = thing.layout, thing.state, thing.traffic
        return {
            "degrees": {axis: layout.of(axis) for axis in self._search.axes},
            "arguments": self._search.arguments(layout),
            "warnings": thing.told,
            "repairs": list(layout.repairs),
            "bytes_per_rank": None if state is None else asdict(state),
            "sent": None
            if traffic is None or traffic.uncounted
            else [
                {"axes": list(axes), "across_nodes": across, "bytes": count}
                for axes, across, count in self._by_axes(traffic.sent)
            ],
            "bytes_in_a_step": None if traffic is None or traffic.uncounted else traffic.peak,
            "uncounted": traffic.uncounted if traffic is not None else None,
        }

    def ending(self) -> dict[str, Any]:
        return {
            "considered": self._search.considered,
            "left_by_arithmetic": len(self._search.candidates),
            "judged": self._search.judged,
            "excluded": dict(self._search.excluded),
        }


def _named(axes: Iterable[str], across: bool | None) -> str:
    return f"{' x '.join(axes)}{' across nodes' if across else ''}"
