"""What is read of torchtitan's source, and what cannot be validated where it is gone.

A tested release is known by its files. Of any other torchtitan it is looked up, without importing it,
whether the fields, functions and classes that a line's files read are still where they were.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Reads:
    """Names that are read in a file of torchtitan.

    Attributes:
        file: below the package.
        names: classes, functions, methods and fields, each by its path: ``Trainer.Config.model_spec``.
        rules: the codes of those that cannot be validated without them; empty means none can.
    """

    file: str
    names: tuple[str, ...]
    rules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gone:
    """Something that is read, and that the installed torchtitan does not have.

    Attributes:
        file: below the package.
        names: as in `Reads`; empty where the file itself is gone.
        rules: as in `Reads`.
    """

    file: str
    names: tuple[str, ...]
    rules: tuple[str, ...]

    @property
    def what(self) -> str:
        """What torchtitan lacks, to follow its name."""
        return f"has no {' and no '.join(self.names)} in {self.file}" if self.names else f"has no {self.file}"

    @property
    def unvalidated(self) -> str:
        """The codes of the rules, or that it is all of them."""
        return ", ".join(self.rules) or "every rule"

    def __str__(self) -> str:
        """Return what is gone, and what is therefore not validated, to follow "torchtitan"."""
        return f"{self.what}, which is read for {self.unvalidated}: not validated."


def gone_from(contract: tuple[Reads, ...], folder: Path) -> tuple[Gone, ...]:
    """Return what a line's contract names and a package does not have.

    Args:
        contract: of the line.
        folder: of the package ``torchtitan``.
    """
    return tuple(_look_up(contract, folder))


def _look_up(contract: tuple[Reads, ...], folder: Path) -> Iterator[Gone]:
    for reads in contract:
        file = folder / reads.file
        if not file.is_file():
            yield Gone(reads.file, (), reads.rules)
            continue
        found = _names_in(file)
        names = tuple(name for name in reads.names if name not in found)
        if names:
            yield Gone(reads.file, names, reads.rules)


def missing_names(found: tuple[Gone, ...]) -> int:
    """Return how much is gone; a file that is not there weighs more than a name."""
    return sum(len(gone.names) or _A_FILE for gone in found)


_A_FILE = 10


@functools.lru_cache
def _names_in(file: Path) -> frozenset[str]:
    """Return the paths of all that a source file defines, in classes and at its top level."""
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    names: set[str] = set()
    inherited: list[tuple[str, str]] = []

    def define(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                names.add(f"{prefix}{node.name}")
            if isinstance(node, ast.ClassDef):
                define(node.body, f"{prefix}{node.name}.")
                inherited.extend((f"{prefix}{node.name}", ast.unparse(base)) for base in node.bases)
            elif isinstance(node, (ast.FunctionDef, ast.If)) and not prefix:
                # Classes that are made in a function, or where something is installed.
                define([part for part in node.body if isinstance(part, ast.ClassDef)], prefix)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(f"{prefix}{node.target.id}")
            elif isinstance(node, ast.Assign):
                names.update(
                    f"{prefix}{target.id}" for target in node.targets if isinstance(target, ast.Name)
                )

    define(tree.body, "")
    # In the order of definition, so that a base has what it inherits itself.
    for name, base in inherited:
        below = [known.removeprefix(base) for known in names if known.startswith(f"{base}.")]
        names.update(f"{name}{rest}" for rest in below)
    return frozenset(names)
