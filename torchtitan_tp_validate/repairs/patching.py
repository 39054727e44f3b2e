"""Put a mended function in the place of one that is known, and take it away again."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torchtitan_tp_validate.errors import RepairError

_standing: list[tuple[Any, str, Any, Any]] = []
"""Owner, name, original and mended object of each patch, in the order in which they were applied."""


@dataclass(frozen=True)
class Patch:
    """A mended object in the place of the original.

    Attributes:
        module: where the original is defined.
        name: its qualified name there.
        known: digests of the sources that the patch is for.
        mend: makes the mended object of the original.
        everywhere: whether modules that imported the original by name get the mended one too.
    """

    module: str
    name: str
    known: tuple[str, ...]
    mend: Callable[[Any], Any]
    everywhere: bool = False

    def check(self) -> None:
        """Check that the original is the code that the patch is for, or is mended already.

        Raises:
            RepairError: it is neither.
        """
        original = self._current
        if any(mended is original for *_, mended in _standing):
            return
        found = digest(original)
        if found not in self.known:
            raise RepairError(
                f"{self.module}.{self.name} is not the code that its repair is for (its digest is {found}): "
                "it is mended already, or of a release that is not known. Nothing was repaired."
            )

    def apply(self) -> None:
        """Put the mended object in place; nothing where it stands already."""
        owner, attribute = self._owner
        original = self._current
        if any(mended is original for *_, mended in _standing):
            return
        mended = self.mend(original)
        _put(owner, attribute, original, mended)
        if self.everywhere:
            for module in list(sys.modules.values()):
                if isinstance(module, ModuleType) and module is not owner:
                    for name, value in list(vars(module).items()):
                        if value is original:
                            _put(module, name, original, mended)

    @property
    def _owner(self) -> tuple[Any, str]:
        owner: Any = importlib.import_module(self.module)
        *path, attribute = self.name.split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, attribute

    @property
    def _current(self) -> Any:
        owner, attribute = self._owner
        return vars(owner)[attribute]


def _put(owner: Any, name: str, original: Any, mended: Any) -> None:
    setattr(owner, name, mended)
    _standing.append((owner, name, original, mended))


def undo_all() -> None:
    """Put every original back where its mended object still stands."""
    while _standing:
        owner, name, original, mended = _standing.pop()
        if vars(owner).get(name) is mended:
            setattr(owner, name, original)


def digest(function: Any) -> str:
    """Return what a function's source comes to, whatever its indentation."""
    source = textwrap.dedent(inspect.getsource(function))
    return hashlib.sha256(source.encode()).hexdigest()[:16]
