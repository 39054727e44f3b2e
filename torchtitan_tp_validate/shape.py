"""Parallelize functions that no table lists: those of a fork's own models, or of a package beside torchtitan.

They are known by their shape, a model and parallel dims among the parameters, and by their source: it leaves
the model to the shardings that its config declares (0.3.x), or has a plan that splits a key projection by
columns (0.2.x). What does neither, as where a solver decides, nobody here can judge. Nothing is imported.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torchtitan_tp_validate.locate import (
    LAYOUTS,
    EntryPoint,
    functions_in,
    module_file,
    package_folder,
    unbindable,
    unbindable_function,
)
from torchtitan_tp_validate.models import is_listed

PLACES = ("torchtitan.models", "torchtitan.experiments")
"""Where a fork keeps its models."""

_PREFIX = "parallelize_"
_HANDS_ON = re.compile(rf"{_PREFIX}|apply_(\w+_)?tp$")
"""What a function is called that does this part of the work: ``apply_non_moe_tp``."""

_WITHOUT_HEADS = "torchtitan.models.flux.parallelize"
"""It declares shardings, and has no tensor parallelism."""


def own_entry_points(package: str) -> Iterator[EntryPoint]:
    """Yield the parallelize functions below a package that no table lists, and that can be judged."""
    folder = package_folder(package)
    yield from () if folder is None else _own_in(folder, package)


def own_name(module: str) -> str:
    """Return what a model is called whose parallelize function is in this module: its package's name."""
    for place in PLACES:
        module = module.removeprefix(f"{place}.")
    for layout in reversed(LAYOUTS):
        module = module.removesuffix(f".{layout}")
    return module


def is_own(function: Callable[..., Any]) -> bool:
    """Return whether this is such a function; a guard of one is one."""
    module: str = getattr(inspect.unwrap(function), "__module__", None) or ""
    return not is_listed(module) and unbindable_function(function) is None and _splits_heads(module)


@functools.cache
def _own_in(folder: Path, package: str) -> tuple[EntryPoint, ...]:
    found = []
    for file in sorted(folder.rglob("*.py")):
        # Most files have none, and parsing takes long.
        if f"def {_PREFIX}" not in file.read_text(encoding="utf-8"):
            continue
        parts = file.relative_to(folder).with_suffix("").parts
        module = ".".join((package, *parts)).removesuffix(".__init__")
        found += [
            EntryPoint(module, name)
            for name, parameters in functions_in(file).items()
            if name.startswith(_PREFIX) and "model" in parameters and unbindable(name, parameters) is None
            if not is_listed(module) and _splits_heads(module)
        ]
    return tuple(found)


def _splits_heads(module: str) -> bool:
    """Return whether a module, or one that it hands on to, splits heads in a way that is known."""
    seen = {_WITHOUT_HEADS}
    ahead = [module]
    while ahead:
        module = ahead.pop()
        file = None if module in seen else module_file(module)
        seen.add(module)
        if file is None:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
        nodes = list(ast.walk(tree))
        if any(_splits(node) for node in nodes):
            return True
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        ahead += _handed_on_to(nodes, package)
    return False


def _splits(node: ast.AST) -> bool:
    """Return whether this splits heads: ``model.parallelize(...)``, or ``{"attention.wk": Colwise...}``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr == "parallelize"
    return isinstance(node, ast.Dict) and any(
        isinstance(key, ast.Constant)
        and "k" in str(key.value).rpartition(".")[2]
        and "att" in str(key.value)
        and "colwise" in ast.unparse(style).lower()
        for key, style in zip(node.keys, node.values, strict=True)
    )


def _handed_on_to(nodes: list[ast.AST], package: str) -> Iterator[str]:
    """Yield the modules of which a source takes functions that do a part of its work."""
    through = {
        node.value.id
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if _HANDS_ON.match(node.attr)
    }
    for node in nodes:
        if not isinstance(node, ast.ImportFrom):
            continue
        above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        taken_from = ".".join((*above, *filter(None, [node.module])))
        for alias in node.names:
            if _HANDS_ON.match(alias.name):
                yield taken_from
            if (alias.asname or alias.name) in through:
                yield f"{taken_from}.{alias.name}"
