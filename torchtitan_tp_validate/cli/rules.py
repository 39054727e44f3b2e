"""``tp-validate rules`` and ``tp-validate rule CODE``: what is checked, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchtitan_tp_validate.cli import output
from torchtitan_tp_validate.rules import RULES, Rule

_LINES = ("torchtitan 0.2.x", "0.3.x, spmd_types", "0.3.x, DTensor backends")
_LATE = "first layer refused late, later ones die"
_EMPTY = "fine while no shard is empty"
IGNORED: dict[str, tuple[str, str, str]] = {
    "TP001": ("dies in forward", _LATE, "the same"),
    "TP002": ("dies in forward", _LATE, "the same"),
    "TP003": ("", _LATE, "the same"),
    "TP004": ("", _LATE, "the same"),
    "TP005": ("dies in forward", "silently wrong", _EMPTY),
    "TP006": (_EMPTY, "last rank raises, the others hang", _EMPTY),
    "TP007": ("", "dies with images", "the same"),
    "TP008": ("", "silently wrong", _EMPTY),
    "TP009": ("parallelize asserts", "Trainer refuses late", "fine"),
    "TP010": ("dies in forward", "silently wrong", _EMPTY),
    "TP011": (
        "fine (gpt-oss: both halves cut in step)",
        "silently wrong",
        f"{_EMPTY} (gpt-oss: both halves cut in step)",
    ),
    "TP012": ("", "silently wrong", _EMPTY),
    "TP013": ("dies in forward if use_grouped_mm", "dies in forward", "the same"),
    "TP014": ("the gathered parts would differ", "the same", "the same"),
    "TP015": ("", "dies in forward", "the same"),
    "EP001": ("dies in forward", "dies in forward", "the same"),
    "FSDP001": ("with EP, parallelize raises", "parallelize raises", "the same"),
}
"""Rule code -> what an uneven split does in each line of torchtitan; empty where it has none such."""


def add_parser(commands: Any) -> None:
    """Declare both subcommands."""
    one = commands.add_parser("rule", help="explain a rule", description="Explain a rule.")
    one.add_argument("code", type=str.upper, choices=list(RULES), metavar="CODE", help="e.g. TP002")
    one.set_defaults(run=run, parser=one, command="rule", output_file=None)
    every = commands.add_parser("rules", help="list all rules", description="List all rules.")
    every.set_defaults(run=run, parser=every, command="rules", code=None, output_file=None)


def run(options: Any) -> int:
    """Run either subcommand; the exit status."""
    output.put(options, list(_list() if options.code is None else _explain(RULES[options.code])))
    return 0


def _list() -> Iterator[output.Line]:
    width = max(len(rule.dim) for rule in RULES.values())
    for rule in RULES.values():
        yield f"{rule.code}  {rule.dim:{width}}  {rule.why}", ""


def _explain(rule: Rule) -> Iterator[output.Line]:
    yield f"{rule.code}: {rule.dim}", "bold"
    yield "", ""
    yield f"The {rule.axis.noun.lower()} must fit {rule.dim}: {rule.why}.", ""
    yield "", ""
    yield "When it does not, and nobody checks:", "bold"
    for line, consequence in zip(_LINES, IGNORED[rule.code], strict=True):
        if consequence:
            yield f"  {line + ':':25} {consequence}", ""
    yield "", ""
    yield f"Source: {rule.source}", "dim"
