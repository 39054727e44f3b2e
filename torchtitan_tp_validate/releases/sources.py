"""What stands in the source of the installed torchtitan: a fault is in it, whatever its number says."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_tp_validate.locate import package_folder


@dataclass(frozen=True)
class Source:
    """A piece of code that is at fault.

    Attributes:
        file: that it is in, below the package.
        text: that stands there, word for word but for space, as long as nobody has mended it.
        package: the file's.
        later: what stands there instead in newer source, all of it; empty where that is the same.
    """

    file: str
    text: str
    package: str = "torchtitan"
    later: tuple[str, ...] = ()

    @property
    def is_installed(self) -> bool:
        """Whether the installed package has it."""
        folder = package_folder(self.package)
        return folder is not None and self.is_in(folder)

    def is_in(self, folder: Path) -> bool:
        """Return whether a package in this folder has it."""
        text = _text(folder / self.file)
        return _joined(self.text) in text or (
            bool(self.later) and all(_joined(piece) in text for piece in self.later)
        )


def installed_faults(sources: Mapping[str, Source], codes: Iterable[str]) -> frozenset[str]:
    """Return those of some faults that are in the installed source.

    Args:
        sources: code -> where the fault is.
        codes: of the faults that the model can have.
    """
    return frozenset(code for code in codes if sources[code].is_installed)


def source_of(thing: Any) -> str:
    """Return the source of a function or class; nothing where it has none, as what is made at run time."""
    try:
        return inspect.getsource(inspect.unwrap(thing))
    except (OSError, TypeError):
        return ""


@functools.cache
def _text(file: Path) -> str:
    return _joined(file.read_text(encoding="utf-8")) if file.is_file() else ""


def _joined(text: str) -> str:
    return " ".join(text.split())
