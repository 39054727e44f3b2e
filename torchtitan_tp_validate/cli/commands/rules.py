"""``tp-validate rules`` and ``tp-validate rule CODE``: what is checked, and why."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from torchtitan_tp_validate.cli import formats
from torchtitan_tp_validate.cli.arguments import Parser, add_output, nearest
from torchtitan_tp_validate.cli.formats import BAD, QUIET, Findings, Line
from torchtitan_tp_validate.degrees import Axis, noun
from torchtitan_tp_validate.rules import FAULTS, LINES, RULES, RUN_RULES, Rule, RunRule

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
    """Return the code of a rule, in capitals.

    Raises:
        argparse.ArgumentTypeError: there is no such rule; the text says which one may be meant.
    """
    code = text.upper()
    if code in _ALL:
        return code
    number = re.fullmatch(r"([A-Z]*)[-_ ]?(\d{1,9})", code, re.ASCII)
    meant = f"{number[1] or 'TP'}{int(number[2]):03}" if number else ""
    hint = f"did you mean {meant}?" if meant in _ALL else nearest(code, _ALL)
    raise argparse.ArgumentTypeError(f"there is no {text!r}; {hint}")


def run(options: Any) -> int:
    """Run either subcommand; the exit status."""
    rules = [_ALL[options.code]] if options.command == "rule" else list(_ALL.values())
    with formats.writing(options, _Rules(rules, in_full=options.command == "rule")) as write:
        for rule in rules:
            write(rule)
    return 0


_ALL: dict[str, Rule | RunRule] = {**RULES, **RUN_RULES, **FAULTS}


class _Rules(Findings[Rule | RunRule]):
    """What is said of rules."""

    columns = ("code", "what it is about", *(line.value for line in LINES), "what to do", "what must hold")

    def __init__(self, rules: Sequence[Rule | RunRule], *, in_full: bool) -> None:
        self._rules, self._in_full = rules, in_full

    def full(self, thing: Rule | RunRule) -> Iterator[Line]:
        return _explain(thing) if self._in_full else iter([(self.line(thing), "")])

    def line(self, thing: Rule | RunRule) -> str:
        width = max(len(_about(other)) for other in _ALL.values())
        text = thing.why if isinstance(thing, Rule) else thing.must
        return f"{thing.code:8} {_about(thing):{width}}  {text}"

    def cells(self, thing: Rule | RunRule) -> Iterator[Line]:
        # In bold where nobody would notice it.
        yield thing.code, ""
        yield f"{_about(thing)} {thing.scope if isinstance(thing, Rule) else ''}".rstrip(), ""
        for line, told in thing.in_short.items():
            yield told, BAD if told and thing.otherwise[line].silent else ""
        yield thing.instead, ""
        if isinstance(thing, Rule):
            axis, example = Axis(thing.axis).name, thing.example
            yield f"{example.size}: {axis} {example.works} works, {axis} {example.fails} does not", ""
        else:
            yield thing.must, ""

    def document(self) -> dict[str, Any]:
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
                for rule in self._rules
                if isinstance(rule, Rule)
            ],
            "run_rules": [
                {
                    "code": rule.code,
                    "about": rule.about,
                    "must": rule.must,
                    "ignored": {line.value: told or None for line, told in rule.in_short.items()},
                    "instead": rule.instead,
                    "source": rule.source,
                    "warns": rule.warns,
                    "can_be_repaired": rule.can_be_repaired,
                }
                for rule in self._rules
                if isinstance(rule, RunRule)
            ],
        }


def _about(rule: Rule | RunRule) -> str:
    return rule.dim if isinstance(rule, Rule) else rule.about


def _explain(rule: Rule | RunRule) -> Iterator[Line]:
    yield f"{rule.code}: {_about(rule)}", "bold"
    yield "", ""
    if isinstance(rule, Rule):
        yield f"The {noun(rule.axis).lower()} must fit {rule.dim}: {rule.why}.", ""
    else:
        yield f"{rule.must[0].upper()}{rule.must[1:]}.", ""
    yield "", ""
    yield "When it does not, and nobody checks:", "bold"
    for line, told in rule.in_short.items():
        if told:
            yield f"  {line.value + ':':25} {told}", ""
    if isinstance(rule, RunRule):
        yield "", ""
        yield f"What to do: {rule.instead}.", ""
    yield "", ""
    yield f"Source: {rule.source}", QUIET
