"""``tp-validate rules`` and ``tp-validate rule CODE``: what is checked, and why."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torchtitan_tp_validate.cli import formats
from torchtitan_tp_validate.cli.arguments import Parser, add_output, nearest
from torchtitan_tp_validate.cli.formats import Findings
from torchtitan_tp_validate.cli.output import Line
from torchtitan_tp_validate.rules import RULES, Rule

SCHEMA_VERSION = 1
"""Of the JSON output, which ``cli/schema-rules.json`` describes."""

_OF_RULE = """\
examples:
  tp-validate rule TP002
  tp-validate rule TP002 --output-format json
"""
_OF_RULES = """\
examples:
  tp-validate rules
  tp-validate rules --output-format json --output-file rules.json
"""
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
    one: Parser = commands.add_parser(
        "rule",
        help="explain a rule",
        description="Explain a rule: what it is about, and what happens where nobody checks it.",
        epilog=_OF_RULE,
    )
    one.add_argument("code", type=_code, metavar="CODE", help="e.g. TP002")
    every: Parser = commands.add_parser(
        "rules",
        help="list all rules",
        description="List all rules: what is checked, and why.",
        epilog=_OF_RULES,
    )
    for parser, command in ((one, "rule"), (every, "rules")):
        add_output(parser, without=("github",))
        parser.set_defaults(run=run, parser=parser, command=command)


def _code(text: str) -> str:
    """The code of a rule, in capitals.

    Raises:
        argparse.ArgumentTypeError: there is no such rule; the text says which one may be meant.
    """
    code = text.upper()
    if code in RULES:
        return code
    number = re.fullmatch(r"([A-Z]*)[-_ ]?(\d{1,9})", code, re.ASCII)
    meant = f"{number[1] or 'TP'}{int(number[2]):03}" if number else ""
    hint = f"did you mean {meant}?" if meant in RULES else nearest(code, RULES)
    raise argparse.ArgumentTypeError(f"there is no {text!r}; {hint}")


def run(options: Any) -> int:
    """Run either subcommand; the exit status."""
    shown = RULES.values() if options.command == "rules" else [RULES[options.code]]
    findings = Findings(
        shown,
        full=_list if options.command == "rules" else lambda rules: itertools.chain(*map(_explain, rules)),
        line=_line,
        annotation=lambda rule: None,
        columns=["code", "dimension", "axis", "why"],
        cells=lambda rule: [(text, "") for text in (rule.code, rule.dim, rule.axis.value, rule.why)],
        document=lambda rules: _as_json(rules).items(),
    )
    formats.emit(options, findings)
    return 0


def _as_json(rules: Iterable[Rule]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "rules": [
            {
                "code": rule.code,
                "dim": rule.dim,
                "axis": rule.axis.value,
                "why": rule.why,
                "ignored": {
                    line: consequence or None
                    for line, consequence in zip(_LINES, IGNORED[rule.code], strict=True)
                },
                "source": rule.source,
            }
            for rule in rules
        ],
    }


def _list(rules: Iterable[Rule]) -> Iterator[Line]:
    return ((_line(rule), "") for rule in rules)


def _line(rule: Rule) -> str:
    width = max(len(other.dim) for other in RULES.values())
    return f"{rule.code}  {rule.dim:{width}}  {rule.why}"


def _explain(rule: Rule) -> Iterator[Line]:
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
