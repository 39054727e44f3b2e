"""Where a torchtitan keeps an entry point, found by looking at its files: nothing is imported.

The releases moved files around (``models/<m>/infra/parallelize.py`` in 0.2.x, ``models/<m>/parallelize.py``
in 0.3.x and in the qwen3_5_moe fork), so a target is found by what is there, not by a version number.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torchtitan_tp_validate.errors import InstallError
from torchtitan_tp_validate.release_files import BLOBS

KNOWN_RELEASES = frozenset(BLOBS)
"""The torchtitan releases that this package is tested with."""

REQUIRED_PARAMETERS = ("model", "parallel_dims")
"""What a guard reads from the call; every release has had both."""

LAYOUTS = ("parallelize", "infra.parallelize")


@dataclass(frozen=True)
class Target:
    """One model's parallelize function, under whatever name and path a release has it.

    Attributes:
        name: our name of the drop-in.
        functions: upstream's names of the function, one of which a release has.
        packages: the packages that define one, the model's own first; the others are experiments with
            a copy that shards the same dimensions.
    """

    name: str
    functions: tuple[str, ...]
    packages: tuple[str, ...]

    def entry_points(self, source: Path | None = None) -> Iterator[EntryPoint]:
        """Yield the entry points of this target; none when the torchtitan has no such model.

        Args:
            source: the root of a torchtitan checkout to look in, instead of the installed torchtitan.
        """
        for package in self.packages:
            folder = package_folder(package, source)
            if folder is not None:
                yield self._entry_point_in(package, folder)

    def _entry_point_in(self, package: str, folder: Path) -> EntryPoint:
        for layout in LAYOUTS:
            file = folder.joinpath(*layout.split(".")).with_suffix(".py")
            if not file.is_file():
                continue
            defined = functions_in(file)
            for function in self.functions:
                if function in defined:
                    problem = unbindable(function, defined[function])
                    return EntryPoint(f"{package}.{layout}", function, problem)
            wanted = " or ".join(self.functions)
            return EntryPoint(
                f"{package}.{layout}", self.functions[0], f"its module does not define {wanted}"
            )
        wanted = " or ".join(f"{layout.replace('.', '/')}.py" for layout in LAYOUTS)
        return EntryPoint(f"{package}.{LAYOUTS[0]}", self.functions[0], f"the package has no {wanted}")


@dataclass(frozen=True)
class EntryPoint:
    """A function in the installed torchtitan that applies tensor parallelism.

    Attributes:
        module: the module that defines it.
        function: its name there.
        problem: why it cannot be guarded, or None.
    """

    module: str
    function: str
    problem: str | None = None

    def __str__(self) -> str:
        return f"{self.module}.{self.function}"

    def load(self) -> Callable[..., Any]:
        """Import it.

        Raises:
            InstallError: it cannot be guarded.
        """
        if self.problem is not None:
            raise InstallError(f"{self} cannot be guarded: {self.problem}.")
        function: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return function


def unbindable(function: str, parameters: tuple[str, ...]) -> str | None:
    """Why a function with these parameter names cannot be guarded, or None when it can.

    A function with ``*args`` or ``**kwargs`` hands on what it does not name.
    """
    missing = [name for name in REQUIRED_PARAMETERS if name not in parameters]
    if not missing or any(name.startswith("*") for name in parameters):
        return None
    return f"{function}({', '.join(parameters)}) takes no {' and no '.join(missing)}"


def unbindable_function(function: Callable[..., Any]) -> str | None:
    """`unbindable` for a live function, whatever has become of it since its definition."""
    name = getattr(function, "__name__", repr(function))
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        return f"the signature of {name} cannot be read: {error}"
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return unbindable(
        name,
        tuple(f"*{p.name}" if p.kind in variadic else p.name for p in signature.parameters.values()),
    )


def torchtitan_version() -> str | None:
    """Return the version of the installed torchtitan, or None when there is none (or it is not declared)."""
    try:
        return metadata.version("torchtitan")
    except metadata.PackageNotFoundError:
        return None


def package_folder(package: str, source: Path | None = None) -> Path | None:
    """Return the folder of a torchtitan package, in a checkout or in the installed torchtitan."""
    root, *parts = package.split(".")
    for location in _installed_folders(root) if source is None else (source / root,):
        folder = Path(location, *parts)
        if (folder / "__init__.py").is_file():
            return folder
    return None


def module_file(module: str) -> Path | None:
    """Return the source of a module, or of a package's ``__init__``, or None where there is none."""
    if module in sys.modules:  # also where nobody would find it: a script
        loaded = getattr(sys.modules[module], "__file__", None)
        return Path(loaded) if loaded and loaded.endswith(".py") else None
    root, *parts = module.split(".")
    for location in _installed_folders(root):
        folder = Path(location, *parts)
        for file in (folder / "__init__.py", *([folder.with_suffix(".py")] if parts else [])):
            if file.is_file():
                return file
    return None


def _installed_folders(root: str) -> Sequence[str]:
    """Where a top-level package lies; nothing below it is asked for, since `find_spec` imports parents."""
    spec = importlib.util.find_spec(root)
    return (spec.submodule_search_locations or ()) if spec else ()


def functions_in(file: Path) -> dict[str, tuple[str, ...]]:
    """Name -> parameter names of the functions that a source file defines at its top level."""
    return _functions_in(file, file.stat().st_mtime_ns)


@functools.lru_cache
def _functions_in(file: Path, changed: int) -> dict[str, tuple[str, ...]]:
    # changed: when it was last; an older reading is of no use.
    del changed
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    return {
        node.name: tuple(
            [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            + [f"*{a.arg}" for a in (node.args.vararg, node.args.kwarg) if a is not None]
        )
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
