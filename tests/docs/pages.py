"""The README and the pages under docs/, and the examples in them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# A comment before a block says what it needs: <!-- needs: torchtitan 0.3.0 -->, which main prints as well, or
# where it has other fields or other faults, <!-- needs: torchtitan 0.3.0 alone -->.
_BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>.*?) -->\n+)?"
    r"```(?P<language>\w+)\n(?P<text>.*?)```\n(?:\n```text\n(?P<shown>.*?)```)?",
    flags=re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code on a page.

    Attributes:
        page: where it is.
        number: its position on the page.
        language: e.g. ``console``.
        text: what is in it.
        needs: package -> releases that its output is of.
        shown: the block of plain text right behind it, which is its output.
    """

    page: Path
    number: int
    language: str
    text: str
    needs: dict[str, tuple[str, ...]]
    shown: str

    def __str__(self) -> str:
        return f"{self.page.stem}-{self.number}"

    @property
    def folder(self) -> Path:
        """Where its commands are run: the README's in the repository, others beside the example files."""
        return ROOT if self.page.parent == ROOT else ROOT / "docs" / "examples"


def blocks(language: str) -> list[Block]:
    """Every block of one language, on all pages."""
    return [block for page in PAGES for block in _blocks(page) if block.language == language]


def _blocks(page: Path) -> Iterator[Block]:
    for number, found in enumerate(_BLOCK.finditer(page.read_text(encoding="utf-8"))):
        needs = {}
        for need in filter(None, (found["needs"] or "").split(", ")):
            package, release, *alone = need.split()
            needs[package] = (release, *(["main"] if release == "0.3.0" and not alone else []))
        yield Block(page, number, found["language"], found["text"], needs, found["shown"] or "")


def parameters(blocks: list[Block]) -> list[Any]:
    """Blocks for a test, each skipped where what it needs is not installed."""
    return [pytest.param(block, marks=pytest.mark.requires(**block.needs), id=str(block)) for block in blocks]


def assert_shows(shown: str, real: str) -> None:
    """Every part between ``[...]`` is in ``real``, in order."""
    position = 0
    for part in shown.split("[...]\n"):
        found = real.find(part, position)
        assert found >= 0, f"shown is\n{part}\nbut the real output is\n{real}"
        position = found + len(part)


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
