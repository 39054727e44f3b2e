"""Foreign text (paths, names, messages that quote them), made harmless: a function per output format.

JSON needs none: its strings are escaped by the encoder.
"""

from __future__ import annotations

import re

# Of GitHub's runner: "::name ...::" at the start of a line, "##[name ...]" anywhere in it; "##vso[" of Azure.
# Source: ActionCommand.cs of actions/runner, "Logging commands" of Azure Pipelines.
_COMMAND = re.compile(r"^(\s*):(?=:)|#(?=#(?:vso)?\[)", re.IGNORECASE)

# What Markdown of GitHub takes literally, wherever it stands: no markup, no HTML, no mention, no reference.
_PLAIN = re.compile(r"(?:[^\W_]|(?<=[^\W_])_+(?=[^\W_])|[ .,;:()'\"/=+%?-])*")
_LINK = re.compile(r"://|www\.|\bGH-\d|:\w+:", re.IGNORECASE)


def visible(text: str) -> str:
    """Return the text with what does not print (control characters, bidi marks, line breaks) spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def terminal(text: str) -> str:
    r"""Return the text as one line for people: nothing in it moves the cursor or speaks to a CI runner.

    A workflow runner reads commands from whatever a step prints, so that ``::error::`` at the start of a
    line and ``##[error]`` are broken up too.
    """
    return _COMMAND.sub(lambda found: f"{found[1] or ''}\\x{ord(found[0][-1]):02x}", visible(text))


def block(text: str) -> str:
    """Return a text of several lines with each made harmless as by `terminal`."""
    return "\n".join(map(terminal, text.split("\n")))


def github(text: str) -> str:
    """Return the text as the message of a workflow command; its line breaks are kept.

    Source: docs.github.com, "Workflow commands for GitHub Actions"; ``toCommandValue`` of actions/toolkit.
    """
    return _percent("\n".join(map(visible, text.split("\n"))), "%\r\n")


def github_property(text: str) -> str:
    """Return the text as a property of a workflow command, e.g. its title."""
    return _percent(visible(text), "%\r\n:,")


def markdown(text: str) -> str:
    """Return the text as a cell of a Markdown table: in a code span where anything in it could be markup."""
    shown = visible(text)
    if _PLAIN.fullmatch(shown) and not _LINK.search(shown):
        return shown
    # A table is cut into cells first: there a backslash keeps a bar in its cell, in code too.
    shown = re.sub(r"\\*\|", lambda bar: "\\|" if bar[0] == "|" else f"{bar[0][:-1]}\\x7c", shown)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    pad = " " if shown.startswith(("`", " ")) or shown.endswith(("`", " ")) else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _percent(text: str, characters: str) -> str:
    for character in characters:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
