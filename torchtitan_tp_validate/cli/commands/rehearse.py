"""``tp-validate rehearse``: does this run start, and train what one process would train?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.cli import formats, output
from torchtitan_tp_validate.cli.arguments import Parser, add_output, positive
from torchtitan_tp_validate.cli.formats import BAD, GOOD, QUIET, Annotation, Findings, Line
from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG

if TYPE_CHECKING:
    from torchtitan_tp_validate.rehearsal.findings import Rehearsal

SCHEMA_VERSION = 1
"""Of the JSON output, which ``cli/schema-rehearse.json`` describes."""

_DEGREES = {**FLAGS, "pp": PIPELINE_FLAG}
_EXAMPLES = """\
examples:
  tp-validate rehearse -- --module gpt_oss --config gpt_oss_20b --parallelism.tensor_parallel_degree 2
  tp-validate rehearse --model qwen3_5 --flavor 35B-A3B --tp 2 --ep 2 --dp-shard 2
  tp-validate rehearse --replicate-kv-heads -- --module qwen3_5 --config qwen35_122b_a10b ...
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser: Parser = commands.add_parser(
        "rehearse",
        help="train a small copy of a run on the CPU, and compare it with one process",
        description="Run the job's own Trainer for two steps on ranks of this machine's CPU, the model made "
        "small without changing what its degrees can split, and compare loss, gradients and copies with one "
        "process. Exit status 0 when they are equal, 1 when they differ or the run dies or hangs, 2 when it "
        "cannot be rehearsed.",
        epilog=_EXAMPLES,
        usage="tp-validate rehearse [options] -- TORCHTITAN'S ARGUMENTS\n"
        "       tp-validate rehearse [options] --model MODEL --flavor FLAVOR --tp N",
    )
    what = parser.add_argument_group("what to rehearse")
    what.add_argument(
        "--model", action="once", help="a model of torchtitan, or the dotted path of a package of your own"
    )
    what.add_argument("--flavor", action="once", help="which of its flavors")
    for field in _DEGREES:
        flag = f"--{field.replace('_', '-')}"
        what.add_argument(
            flag, type=positive, action="once", metavar="N", help=f"parallelism.{_DEGREES[field]}"
        )
    parser.add_argument(
        "--replicate-kv-heads",
        action="store_true",
        help="rehearse with KV-head replication, which the launcher has under the same flag",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="rehearse with the repairs of known faults, which the launcher has under the same flag",
    )
    parser.add_argument(
        "--ranks",
        type=positive,
        default=4,
        metavar="N",
        help="the most ranks to take (default: 4); degrees are cut to fit, and what was cut is said",
    )
    parser.add_argument(
        "--patience",
        type=positive,
        metavar="SECONDS",
        help="after which ranks that make no progress are taken to hang (default: 60, or 600 with --compile)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile what the run compiles, which takes minutes; otherwise nothing is",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="leave weights, gradients, the output of all ranks and a script that repeats the rehearsal in "
        "a new folder",
    )
    add_output(parser)
    parser.set_defaults(run=run, parser=parser, command="rehearse", hint="a run's arguments follow --")


def run(options: Any) -> int:
    """Run the subcommand; the exit status."""
    from torchtitan_tp_validate.rehearsal.rehearse import rehearse

    degrees = {
        theirs: getattr(options, ours)
        for ours, theirs in _DEGREES.items()
        if getattr(options, ours) is not None
    }
    if (options.torchtitan_arguments is None) == (options.model is None):
        options.parser.error("name one thing to rehearse: -- and torchtitan's arguments, or --model")
    if options.model is None and (degrees or options.flavor):
        options.parser.error("the run has its own model and degrees: give them after --")
    if options.model is not None and options.flavor is None:
        options.parser.error("--flavor is missing: which flavor of the model?")
    with output.status() as progress:
        seen = rehearse(
            options.torchtitan_arguments or (),
            model=options.model or "",
            flavor=options.flavor or "",
            degrees=degrees,
            replicate_kv_heads=options.replicate_kv_heads,
            compile=options.compile,
            repair=options.repair,
            ranks=options.ranks,
            patience=options.patience,
            keep=options.keep,
            progress=progress,
        )
    with formats.writing(options, _Rehearsals()) as write:
        write(seen)
    return 0 if seen.outcome == "equal" else 1


class _Rehearsals(Findings["Rehearsal"]):
    """What is said of a rehearsal."""

    columns = ("run", "outcome", "what was seen", "rules")
    array = "rehearsals"

    def __init__(self) -> None:
        from torchtitan_tp_validate.rehearsal import told

        self._told = told

    def full(self, thing: Rehearsal) -> Iterator[Line]:
        yield (
            f"{self._told.name(thing)}: {self._told.OUTCOMES[thing.outcome]}",
            GOOD if thing.outcome == "equal" else BAD,
        )
        yield from ((f"  {line}", "") for line in self._told.seen(thing))
        yield from ((f"    {line}", QUIET) for line in self._told.stack(thing))
        yield from ((f"  {line}", QUIET) for line in self._told.circumstances(thing))

    def line(self, thing: Rehearsal) -> str:
        return f"{self._told.name(thing)}: {self._told.OUTCOMES[thing.outcome]}: {self._told.seen(thing)[0]}"

    def annotation(self, thing: Rehearsal) -> Annotation | None:
        if thing.outcome == "equal":
            return None
        return Annotation(
            "error",
            self._told.name(thing),
            "\n".join((self._told.OUTCOMES[thing.outcome], *self._told.seen(thing))),
        )

    def cells(self, thing: Rehearsal) -> list[Line]:
        outcome = (self._told.OUTCOMES[thing.outcome], "" if thing.outcome == "equal" else BAD)
        verdict = thing.verdict.partition("\n")[0]
        return [(self._told.name(thing), ""), outcome, (self._told.seen(thing)[0], ""), (verdict, "")]

    def document(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION}

    def item(self, thing: Rehearsal) -> dict[str, Any]:
        content = asdict(thing)
        for difference in content["differences"]:
            for name in ("distance", "factor"):
                # JSON has no numbers that are none.
                value = difference[name]
                difference[name] = value if abs(value) < float("inf") else None
        content["worst"] = thing.worst if abs(thing.worst) < float("inf") else None
        return content
