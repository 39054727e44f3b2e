"""``tp-validate rehearse``: does this run start, and train what one process would train?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torchtitan_tp_validate.cli import formats
from torchtitan_tp_validate.cli.arguments import Parser, add_output, positive
from torchtitan_tp_validate.cli.formats import BAD, GOOD, QUIET, Annotation, Findings, Line
from torchtitan_tp_validate.degrees import FLAGS, PIPELINE_FLAG

if TYPE_CHECKING:
    from torchtitan_tp_validate.rehearsal.rehearse import Difference, Rehearsal

SCHEMA_VERSION = 1
"""Of the JSON output, which ``cli/schema-rehearse.json`` describes."""

_MOST_SHOWN = 3
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
        "--ranks",
        type=positive,
        default=4,
        metavar="N",
        help="the most ranks to take (default: 4); degrees are cut to fit, and what was cut is said",
    )
    parser.add_argument(
        "--patience",
        type=positive,
        default=60,
        metavar="SECONDS",
        help="after which ranks that make no progress are taken to hang (default: 60)",
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
    seen = rehearse(
        options.torchtitan_arguments or (),
        model=options.model or "",
        flavor=options.flavor or "",
        degrees=degrees,
        replicate_kv_heads=options.replicate_kv_heads,
        ranks=options.ranks,
        patience=options.patience,
    )
    with formats.writing(options, _Rehearsals()) as write:
        write(seen)
    return 0 if seen.outcome == "equal" else 1


class _Rehearsals(Findings["Rehearsal"]):
    """What is said of a rehearsal."""

    columns = ("run", "outcome", "what was seen", "rules")
    array = "rehearsals"

    def full(self, thing: Rehearsal) -> Iterator[Line]:
        good = thing.outcome == "equal"
        yield f"{_name(thing)}: {_OUTCOMES[thing.outcome]}", GOOD if good else BAD
        for line in _seen(thing):
            yield f"  {line}", ""
        more = len(_causes(thing)) - _MOST_SHOWN
        if more > 0:
            yield f"  and {more} more", QUIET
        for end in thing.ends[:1]:
            for line in end["traceback"].strip().splitlines()[-_MOST_TRACEBACK:]:
                yield f"    {line}", QUIET
        yield f"  by the rules: {thing.verdict.partition(chr(10))[0]}", ""
        for cut in thing.cuts:
            yield f"  smaller than in the run: {cut}", QUIET
        if thing.stand_ins:
            yield f"  not the run's own, on the CPU: {', '.join(thing.stand_ins)}", QUIET

    def line(self, thing: Rehearsal) -> str:
        return f"{_name(thing)}: {_OUTCOMES[thing.outcome]}: {next(_seen(thing))}"

    def annotation(self, thing: Rehearsal) -> Annotation | None:
        if thing.outcome == "equal":
            return None
        return Annotation("error", _name(thing), "\n".join((_OUTCOMES[thing.outcome], *_seen(thing))))

    def cells(self, thing: Rehearsal) -> list[Line]:
        outcome = (_OUTCOMES[thing.outcome], "" if thing.outcome == "equal" else BAD)
        verdict = thing.verdict.partition("\n")[0]
        return [(_name(thing), ""), outcome, (next(_seen(thing)), ""), (verdict, "")]

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


_OUTCOMES = {
    "equal": "equal to one process",
    "differs": "differs from one process",
    "dies": "dies",
    "hangs": "hangs",
}
_MOST_TRACEBACK = 6


def _name(thing: Rehearsal) -> str:
    degrees = ", ".join(f"{axis} {degree}" for axis, degree in thing.degrees.items()) or "one rank"
    return f"{thing.model} at {degrees}"


def _seen(thing: Rehearsal) -> Iterator[str]:
    """Yield what was seen, the likeliest cause first."""
    if thing.outcome == "equal":
        yield (
            f"loss, gradient norm, {thing.compared} gradients and all copies over two steps, at local batch "
            f"sizes 2 and 1; worst relative difference {thing.worst:.1e}"
        )
    elif thing.ends:
        first = next((end for end in thing.ends if end["how"] in ("raised", "killed")), thing.ends[0])
        others = len([end for end in thing.ends if end["how"] == first["how"]]) - 1
        who = f"rank {first['rank']}{f' and {others} more' if others else ''}"
        error = first["error"].strip().partition("\n")[0]
        yield f"{who}, {first['stage']}{f': {error}' if error else ''}"
    else:
        if thing.output:
            yield f"the first wrong output of the forward pass is that of {thing.output}"
        yield from map(_told, _causes(thing)[:_MOST_SHOWN])


def _causes(thing: Rehearsal) -> list[Difference]:
    """Return the first difference of each kind and parameter."""
    first: dict[tuple[str, str], Difference] = {}
    for difference in thing.differences:
        first.setdefault((difference.what, difference.name), difference)
    return list(first.values())


def _told(difference: Difference) -> str:
    where = f"step {difference.step}, local batch size {difference.local_batch_size}"
    if difference.what == "copies":
        return f"the copies of {difference.name} on several ranks are not equal after {where}"
    if difference.what == "trainable":
        return f"{difference.name} is trained here or in one process, not in both"
    of = f" of {difference.name}" if difference.name else ""
    times = f"{difference.factor:.3f} times that of one process"
    looks = f": {difference.looks_like}" if difference.looks_like else ""
    return f"{difference.what}{of} is {times}{looks} ({where}; off by {difference.distance:.1e})"
