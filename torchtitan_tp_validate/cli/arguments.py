"""What the subcommands' arguments share: their parser, their degrees and where the result goes."""

from __future__ import annotations

import argparse
import os
from typing import Any, NoReturn

from torchtitan_tp_validate.errors import TPValidateError
from torchtitan_tp_validate.rules import Degrees

FORMATS = ("full", "concise", "json", "github", "markdown")
_MOST_DEGREES = 4096
_LARGEST = 1 << 30


class UsageError(TPValidateError):
    """The command line asks for something that cannot be done; the text says what to do."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """argparse's own; it would import shutil, a tenth of the whole start, to learn the terminal's width."""

    def __init__(self, prog: str) -> None:
        try:
            columns = os.get_terminal_size().columns
        except OSError:  # no terminal
            columns = 80
        super().__init__(prog, width=max(columns, 40) - 2)


class Parser(argparse.ArgumentParser):
    """argparse, with a suggestion for a word that is nearly right."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": _Formatter, **kwargs})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            import difflib

            known = [str(choice) for choice in action.choices]
            close = difflib.get_close_matches(str(value), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise argparse.ArgumentError(action, f"there is no {value!r}; {hint}")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and how to learn more, in two lines."""
        self.exit(2, f"{self.prog}: {message}\nTry '{self.prog} --help'.\n")


def add_degrees(parser: Parser) -> None:
    """The degrees other than TP that decide what is split."""
    group = parser.add_argument_group("other degrees of the run")
    group.add_argument("--ep", type=positive, default=1, metavar="N", help="expert parallel degree")
    group.add_argument("--cp", type=positive, default=1, metavar="N", help="context parallel degree")
    group.add_argument("--seq-len", type=positive, metavar="N", help="training.seq_len, to be judged too")
    group.add_argument(
        "--spmd-backend",
        choices=("spmd_types", "partial_dtensor", "full_dtensor"),
        default=Degrees.spmd_backend,
        help="parallelism.spmd_backend of torchtitan 0.3.x (default: %(default)s)",
    )


def degrees(options: argparse.Namespace, tp: int) -> Degrees:
    """What the command line asks for, at one TP degree."""
    return Degrees(
        tp=tp,
        ep=options.ep,
        cp=options.cp,
        spmd_backend=options.spmd_backend,
        seq_len=options.seq_len,
    )


def add_output(parser: Parser) -> None:
    """Format and place of the result."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-format",
        choices=FORMATS,
        default="full",
        help="full (default), concise (a line each), json (versioned schema), github (annotations), markdown",
    )
    group.add_argument("--output-file", metavar="FILE", help="write the result there, not to standard output")


def tp_degrees(text: str) -> tuple[int, ...]:
    """``4``, ``1-64`` or ``2,4,8``: TP degrees, ascending.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        low = positive(first)
        high = positive(last) if dash else low
        if high < low:
            raise argparse.ArgumentTypeError(f"the range {part} runs backwards")
        if high - low >= _MOST_DEGREES:
            raise argparse.ArgumentTypeError(f"the range {part} has more than {_MOST_DEGREES} degrees")
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def positive(text: str) -> int:
    """A degree, or a number of ranks or tokens.

    Raises:
        argparse.ArgumentTypeError: it is no positive whole number, or beyond all reason.
    """
    if text.isascii() and text.isdigit() and len(text) <= 10 and 1 <= int(text) <= _LARGEST:
        return int(text)
    shown = text if len(text) <= 40 else f"{text[:37]}..."
    raise argparse.ArgumentTypeError(f"{shown!r} is not a whole number from 1 to {_LARGEST}")
