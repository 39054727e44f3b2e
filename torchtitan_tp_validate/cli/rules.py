"""``tp-validate rules`` and ``tp-validate rule CODE``: what is checked, and why."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from torchtitan_tp_validate.cli import output
from torchtitan_tp_validate.cli.arguments import Parser, add_output, nearest
from torchtitan_tp_validate.degrees import Axis, noun
from torchtitan_tp_validate.rules import LINES, RULES, Rule

SCHEMA_VERSION = 1
"""Of the JSON output, which ``schema-rules.json`` beside this file describes."""

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
        add_output(parser, ("full", "json", "markdown"))
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
    if options.output_format == "json":
        import json

        output.put_document(options, [json.dumps(_as_json(shown), indent=2)])
    elif options.output_format == "markdown":
        output.put_document(options, list(as_markdown(shown)))
    else:
        output.put(options, _list() if options.command == "rules" else _explain(RULES[options.code]))
    return 0


def _as_json(rules: Iterable[Rule]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "rules": [
            {
                "code": rule.code,
                "dim": rule.dim,
                "axis": rule.axis,
                "why": rule.why,
                "ignored": {line.value: told or None for line, told in rule.in_short.items()},
                "instead": rule.instead,
                "example": asdict(rule.example),
                "source": rule.source,
            }
            for rule in rules
        ],
    }


def as_markdown(rules: Iterable[Rule]) -> Iterator[str]:
    """Yield the lines of two tables: what an uneven split does, and what to do about it."""
    rules = tuple(rules)
    yield f"| code | dimension | {' | '.join(line.value for line in LINES)} |"
    yield "|---|---|" + "---|" * len(LINES)
    for rule in rules:
        dim = f"`{rule.dim}` {rule.scope}".rstrip()
        yield f"| {rule.code} | {dim} |{''.join(_cells(rule))}"
    yield ""
    yield "| code | why | what to do | for example |"
    yield "|---|---|---|---|"
    for rule in rules:
        degree, example = Axis(rule.axis).name, rule.example
        yield (
            f"| {rule.code} | {rule.why} | {rule.instead} "
            f"| {example.size}: {degree} {example.works} works, {degree} {example.fails} does not |"
        )


def _cells(rule: Rule) -> Iterator[str]:
    """What it does in each line; in bold where nobody would notice."""
    for line, told in rule.in_short.items():
        bold = "**" if told and rule.otherwise[line].silent else ""
        yield f" {bold}{told}{bold} |" if told else " |"


def _list() -> Iterator[output.Line]:
    width = max(len(rule.dim) for rule in RULES.values())
    for rule in RULES.values():
        yield f"{rule.code}  {rule.dim:{width}}  {rule.why}", ""


def _explain(rule: Rule) -> Iterator[output.Line]:
    yield f"{rule.code}: {rule.dim}", "bold"
    yield "", ""
    yield f"The {noun(rule.axis).lower()} must fit {rule.dim}: {rule.why}.", ""
    yield "", ""
    yield "When it does not, and nobody checks:", "bold"
    for line, told in rule.in_short.items():
        if told:
            yield f"  {line.value + ':':25} {told}", ""
    yield "", ""
    yield f"Source: {rule.source}", "dim"
