"""Who may import whom, read from every import of the package: only upwards in ORDER, and no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torchtitan_tp_validate

PACKAGE = "torchtitan_tp_validate"
FOLDER = Path(torchtitan_tp_validate.__file__).parent

ORDER = (
    ("errors", "rules", "models", "release_files", "hardware"),
    ("degrees", "notices", "failure", "locate"),
    ("plan", "supported", "identity", "checkpoint", "shape"),
    ("layout",),
    ("faults",),
    ("releases",),
    ("advice",),
    ("validate",),
    ("job", "registry"),
    ("search",),
    ("wrappers",),
    ("guards",),
    ("transformers_tp", "kv_replication", "repairs"),
    ("rehearsal",),
    ("cli",),
    ("train", "__main__"),
    ("auto",),
)
"""The modules and folders of the package, from what knows nobody to what knows the most.

A module imports what stands above its own row, or lies in its own folder.
"""

OPT_INS = ("transformers_tp", "kv_replication", "repairs", "rehearsal")
"""Reached by name: whatever stands above them imports them inside a function, when they are asked for."""

HEAVY = ("torch", "torchtitan", "transformers", "spmd_types", "wrapt")
"""Imported inside functions only, ..."""

HEAVY_AT_ONCE = {
    *(
        f"{PACKAGE}.kv_replication.{module}"
        for module in ("gather", "linears", "torchtitan_0_2", "torchtitan_0_3", "transformers_backend")
    ),
    *(
        f"{PACKAGE}.rehearsal.{module}"
        for module in (
            *(
                "batches",
                "checkpoints",
                "parallelize",
                "pipeline",
                "process",
                "rank",
                "stand_ins",
                "traffic",
                "peak",
                "training",
            ),
        )
    ),
    f"{PACKAGE}.rehearsal.models.torchtitan_0_3",
    f"{PACKAGE}.repairs.gradients",
}
"""... but for what is made of them."""


@dataclass(frozen=True)
class Import:
    """One import.

    Attributes:
        importer: the module that it stands in.
        imported: the module, of the package down to the file.
        at_once: whether it happens as the importer is imported.
    """

    importer: str
    imported: str
    at_once: bool

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported}{'' if self.at_once else ', inside a function'}"


@cache
def modules() -> dict[str, Path]:
    """Name -> file of every module."""
    found = {}
    for path in sorted(FOLDER.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(FOLDER).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(
        found
        for module, path in modules().items()
        for found in _imports_below(ast.parse(path.read_text(encoding="utf-8")), module, at_once=True)
    )


def _imports_below(node: ast.AST, module: str, *, at_once: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(module, alias.name, at_once)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: a relative import"
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                yield Import(module, name if name in modules() else str(child.module), at_once)
        else:
            deferred = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports_below(child, module, at_once=at_once and not deferred)


def ours() -> list[Import]:
    # The package itself gives its public names by asking the modules: whom it imports is no matter of order.
    return [found for found in imports() if found.imported in modules() and PACKAGE not in _ends(found)]


def _ends(found: Import) -> tuple[str, str]:
    return found.importer, found.imported


def top(module: str) -> str:
    """The row's entry that a module belongs to: its own name, or its folder's."""
    return module.split(".")[1]


def row(module: str) -> int:
    return next(index for index, names in enumerate(ORDER) if top(module) in names)


def test_every_module_has_its_place_in_the_order() -> None:
    known = [name for names in ORDER for name in names]
    assert sorted(known) == sorted({top(module) for module in modules() if module != PACKAGE})


def test_a_module_imports_only_what_stands_above_it() -> None:
    wrong = [
        str(found)
        for found in ours()
        if top(found.importer) != top(found.imported)
        and row(found.imported) >= row(found.importer)
        and not (top(found.imported) in OPT_INS and not found.at_once)
    ]
    assert wrong == []


def test_no_import_leads_back_to_where_it_came_from() -> None:
    """Those inside functions count too: a circle is a circle, whenever it closes."""
    below: dict[str, list[str]] = {module: [] for module in modules()}
    for found in ours():
        below[found.importer].append(found.imported)
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for imported in below[module]:
            walk(imported, (*path, module))
        done.add(module)

    for module in below:
        walk(module, ())


def test_nothing_loads_an_opt_in_before_it_is_asked_for() -> None:
    wrong = [
        str(found)
        for found in ours()
        if found.at_once and top(found.imported) in OPT_INS and top(found.importer) != top(found.imported)
    ]
    assert wrong == []


def test_nothing_outside_releases_knows_a_line_of_torchtitan_by_name() -> None:
    lines = f"{PACKAGE}.releases.torchtitan_"
    wrong = [
        str(found)
        for found in ours()
        if found.imported.startswith(lines) and top(found.importer) != "releases"
    ]
    assert wrong == []


def test_torch_and_torchtitan_are_loaded_by_nothing_but_what_is_made_of_them() -> None:
    at_once = {
        found.importer for found in imports() if found.at_once and found.imported.partition(".")[0] in HEAVY
    }
    assert at_once == HEAVY_AT_ONCE
