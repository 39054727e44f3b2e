"""Where a result goes: standard output, in color on a terminal, or a file; and progress, beside it.

Everything is written as it is found: nothing is kept, so that memory does not grow with the result.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from torchtitan_tp_validate.cli import escape, files
from torchtitan_tp_validate.errors import TPValidateError

_T = TypeVar("_T")

Line = tuple[str, str]
"""A line and its style, in the words of rich; no style is plain. Foreign text may stand in it as it is."""

BAD, QUIET, GOOD = "bold red", "dim", "green"
_WIDEST = 500


class OutputError(TPValidateError):
    """Standard output does not take the result; the text says why."""


def put(options: Any, lines: Iterable[Line | str]) -> None:
    """Write lines to the output file that the options name, or to standard output.

    Args:
        lines: for people, with a style: each stays one line, whatever names it quotes, and is in color where
            that is a terminal; or as text, of a format that escapes foreign text by its own rules.

    Raises:
        UnreadableError: the output file cannot be written.
        OutputError: nor can standard output.
    """
    if options.output_file is not None:
        files.write(options.output_file, (f"{_plain(line)}\n" for line in lines))
        return
    with _standard_output() as stream:
        in_color, paint = uses_color(stream), None
        for line in lines:
            if in_color and not isinstance(line, str):
                paint = paint or _painter()
                paint(line)
            else:
                # A name may hold what the encoding does not.
                encoding = stream.encoding or "utf-8"
                stream.write(f"{_plain(line)}\n".encode(encoding, "backslashreplace").decode(encoding))


def _plain(line: Line | str) -> str:
    return line if isinstance(line, str) else escape.terminal(line[0])


def _painter() -> Callable[[Line], None]:
    """Return what prints a line in its style."""
    from rich.console import Console
    from rich.text import Text

    # Lines are as long as they are: a terminal wraps them itself.
    console = Console(force_terminal=True, highlight=False, soft_wrap=True)
    return lambda line: console.print(Text(_plain(line), style=line[1]))


@contextlib.contextmanager
def _standard_output() -> Iterator[TextIO]:
    """Standard output, written to the end.

    Raises:
        OutputError: it does not take it.
        BrokenPipeError: nobody reads it any more.
    """
    if sys.stdout is None:
        raise OutputError("the result cannot be written: standard output is closed.")
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"the result cannot be written to standard output: {files.reason(error)}"
        ) from error


def uses_color(stream: TextIO) -> bool:
    """Whether to color what goes there: https://no-color.org, else a terminal that is not dumb."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def show(renderable: Any) -> None:
    """Draw a table of rich on standard output, in color."""
    from rich.console import Console

    with _standard_output():
        console = Console(force_terminal=True, highlight=False)
        # A narrow terminal wraps its lines; columns that vanish would be worse.
        console.width = max(console.width, width_of(renderable, console))
        console.print(renderable)


def width_of(renderable: Any, console: Any) -> int:
    """How many columns a table of rich needs to show everything."""
    width: int = console.measure(renderable, options=console.options.update(width=_WIDEST)).maximum
    return width


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[Sequence[_T]], Iterable[_T]]]:
    """A progress bar on standard error while its items are gone through, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda items: items
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        yield lambda items: bar.track(items, description=title)
