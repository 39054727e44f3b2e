"""What the subcommands' arguments share: their parser, their degrees and where the result goes."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from torchtitan_tp_validate.cli import formats
from torchtitan_tp_validate.cli.formats import terminal
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.releases import releases
from torchtitan_tp_validate.rules import FAULTS, RUN_RULES

if TYPE_CHECKING:
    from torchtitan_tp_validate.job import Options

_MOST_DEGREES = 4096
_LARGEST = 1 << 30


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """argparse's own; it would import shutil, a tenth of the whole start, to learn the terminal's width."""

    def __init__(self, prog: str) -> None:
        try:
            columns = os.get_terminal_size().columns
        except OSError:  # no terminal
            columns = 80
        super().__init__(prog, width=max(columns, 40) - 2)


class _Collect(argparse.Action):
    """A list, to which every further use of the option adds; degrees stand in order, each once."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        found = [*(getattr(namespace, self.dest) or ()), *values]
        setattr(namespace, self.dest, tuple(sorted(set(found))) if self.type is tp_degrees else found)


class _Once(argparse.Action):
    """One value: a second one would take the place of the first without a word."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        if getattr(namespace, self.dest) not in (None, values):
            raise argparse.ArgumentError(self, "is given twice: which one?")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """argparse, with a suggestion for a word that is nearly right."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": _Formatter, **kwargs})
        self.register("action", "collect", _Collect)
        self.register("action", "once", _Once)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"there is no {value!r}; {nearest(value, action.choices)}")

    def raise_if_unknown(self, words: Sequence[str], hint: str = "") -> None:
        """Complain of words that no argument took; return when there are none.

        Args:
            hint: what to say where the first of them is no option.
        """
        if not words:
            return
        word = words[0]
        if not word.startswith("-"):
            self.error(f"{word!r} is one argument too many{hint and f'; {hint}'}")
        flag = word.partition("=")[0]
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        # One dash, or an underscore, is a slip that the others would hide.
        meant = f"--{flag.lstrip('-').replace('_', '-')}"
        self.error(f"there is no option {flag!r}; {nearest(meant, known)}")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and how to learn more, in two lines."""
        self.exit(2, f"{self.prog}: {terminal(message)}\nTry '{self.prog} --help'.\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own swallows a failed write.
        stream = file or sys.stderr
        if message and stream is not None:
            stream.write(message)


def nearest(word: Any, known: Any) -> str:
    """Return what to say of a word that is none of the known ones: the nearest of them, or all."""
    import difflib

    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(word), names, n=1)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(names)}"


def add_degrees(parser: Parser) -> None:
    """Add the degrees other than TP that decide what is split."""
    group = parser.add_argument_group("other degrees of the run")
    group.add_argument("--ep", type=positive, action="once", metavar="N", help="expert parallel degree")
    group.add_argument("--cp", type=positive, action="once", metavar="N", help="context parallel degree")
    group.add_argument(
        "--seq-len", type=positive, action="once", metavar="N", help="training.seq_len, to be judged too"
    )
    group.add_argument(
        "--spmd-backend",
        action="once",
        choices=list(dict.fromkeys(backend.name for line in releases() for backend in line.SPMD_BACKENDS)),
        help=f"parallelism.spmd_backend of torchtitan 0.3.x (default: {Degrees.spmd_backend})",
    )
    add_replication(group)


def add_repairs(parser: Any) -> None:
    """Add the flags of the launcher that are about known faults."""
    parser.add_argument(
        "--repair",
        action="store_true",
        help="judge a torchtitan run with the repairs of known faults, which the launcher has under the same "
        "flag",
    )
    parser.add_argument(
        "--allow",
        action="collect",
        type=codes,
        metavar="CODE",
        help="a rule on the run as a whole that is told, and does not refuse it: NUM001, or NUM001,PP005",
    )


_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def size(text: str) -> int:
    """Return a number of bytes.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    number = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([a-zA-Z]*)", text, re.ASCII)
    if number is None or number[2].upper() not in _UNITS or not (count := float(number[1])):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no size: write 80GiB, 141GB or a number of bytes")
    return int(count * _UNITS[number[2].upper()])


def codes(text: str) -> tuple[str, ...]:
    """Return the codes of rules on a run as a whole.

    Raises:
        argparse.ArgumentTypeError: there is no such rule.
    """
    found = tuple(text.upper().split(","))
    known = {**RUN_RULES, **FAULTS}
    for code in found:
        if code not in known:
            raise argparse.ArgumentTypeError(f"there is no {code!r}; {nearest(code, known)}")
    return found


def run_options(options: argparse.Namespace) -> Options:
    """Return how the command line wants jobs to be judged."""
    # Deferred: --help needs none of what it loads.
    from torchtitan_tp_validate.job import Options

    return Options(
        replicate_kv_heads=options.replicate_kv_heads,
        repair=options.repair,
        allow=tuple(options.allow or ()),
        world_size=getattr(options, "world_size", None),
        gpus_per_node=getattr(options, "gpus_per_node", None),
    )


def add_replication(parser: Any) -> None:
    """Add the flag of the launcher."""
    parser.add_argument(
        "--replicate-kv-heads",
        action="store_true",
        help="judge a torchtitan run with KV-head replication, which the launcher has under the same flag",
    )


def degrees(options: argparse.Namespace, tp: int) -> Degrees:
    """Return what the command line asks for, at one TP degree."""
    given = {name: getattr(options, name) for name in ("ep", "cp", "spmd_backend", "seq_len")}
    return Degrees(
        tp=tp,
        replicate_kv_heads=options.replicate_kv_heads,
        **{name: value for name, value in given.items() if value is not None},
    )


def add_output(
    parser: Parser, without: Sequence[str] = (), more: Mapping[str, formats.Format] = MappingProxyType({})
) -> None:
    """Format and place of the result.

    Args:
        without: the formats that say nothing of what this command finds.
        more: those that it alone has.
    """
    offered = {name: found for name, found in formats.FORMATS.items() if name not in without} | dict(more)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-format",
        choices=list(offered),
        default=next(iter(offered)),
        help=", ".join(
            f"{name} ({found.meaning})" if found.meaning else name for name, found in offered.items()
        ),
    )
    group.add_argument("--output-file", metavar="FILE", help="write the result there, not to standard output")


def tp_degrees(text: str) -> tuple[int, ...]:
    """``4``, ``1-64`` or ``2,4,8``: TP degrees, ascending.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    found: set[int] = set()
    for part in text.split(","):
        low, high = _range(part, text)
        if high < low:
            raise argparse.ArgumentTypeError(f"the range {part} runs backwards")
        if high - low >= _MOST_DEGREES:
            raise argparse.ArgumentTypeError(f"the range {part} has more than {_MOST_DEGREES} degrees")
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def _range(part: str, text: str) -> tuple[int, int]:
    """Return the first and the last degree of one part of the text."""
    first, dash, last = part.partition("-")
    if not part:
        where = "" if not text else f" in {_shortened(text)}, beside a comma"
        raise argparse.ArgumentTypeError(f"a degree is missing{where}: write 4, 1-64 or 2,4,8")
    if dash and first and not last:
        raise argparse.ArgumentTypeError(f"the range {part} has no end: write {first}-64, for example")
    if dash and not first:
        raise argparse.ArgumentTypeError(
            f"{_shortened(part)} is negative, or a range without its beginning: degrees start at 1"
        )
    if not (first.isascii() and first[:1].isdigit()):
        raise argparse.ArgumentTypeError(
            f"{_shortened(part)} is not a degree: write a number as 4, a range as 1-64, or a list as 2,4,8"
        )
    low = positive(first)
    return low, positive(last) if dash else low


def positive(text: str) -> int:
    """Return a degree, or a number of ranks or tokens.

    Raises:
        argparse.ArgumentTypeError: it is no positive whole number, or beyond all reason.
    """
    if text.isascii() and text.isdigit() and len(text) <= 10 and 1 <= int(text) <= _LARGEST:
        return int(text)
    raise argparse.ArgumentTypeError(f"{_shortened(text)} is not a whole number from 1 to {_LARGEST}")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
