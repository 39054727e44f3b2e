"""Standard output, and what a terminal gets more than text: color, a picture of a table, progress."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from torchtitan_tp_validate.cli import files
from torchtitan_tp_validate.errors import OutputError

_T = TypeVar("_T")

_WIDEST = 500


@contextlib.contextmanager
def standard_output() -> Iterator[TextIO]:
    """Give standard output, and see that it is written to the end.

    Raises:
        OutputError: it does not take the result.
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
    """Return whether to color what goes there: https://no-color.org, else a terminal that is not dumb."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def painter() -> Callable[[str, str], None]:
    """Return what prints a line in a style."""
    from rich.console import Console
    from rich.text import Text

    # Lines are as long as they are: a terminal wraps them itself.
    console = Console(force_terminal=True, highlight=False, soft_wrap=True)
    return lambda line, style: console.print(Text(line, style=style))


def show(renderable: Any) -> None:
    """Draw a table of rich on standard output, in color."""
    from rich.console import Console

    with standard_output():
        console = Console(force_terminal=True, highlight=False)
        # A narrow terminal wraps its lines; columns that vanish would be worse.
        console.width = max(console.width, width_of(renderable, console))
        console.print(renderable)


def width_of(renderable: Any, console: Any) -> int:
    """Return how many columns a table of rich needs to show everything."""
    width: int = console.measure(renderable, options=console.options.update(width=_WIDEST)).maximum
    return width


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[Sequence[_T]], Iterable[_T]]]:
    """Draw a progress bar on standard error while items are gone through, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda items: items
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        yield lambda items: bar.track(items, description=title)


@contextlib.contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """Show on standard error what goes on, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("") as shown:
        yield lambda text: shown.update(escape(text))
