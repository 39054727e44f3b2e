#!/usr/bin/env python
"""Make the upstream patch for any torchtitan checkout: a release, main, or a fork.

    scripts/make_patches.py --source CHECKOUT [--out DIR]

The entry points are those that this package guards, found in the checkout's syntax trees by name; a model
under torchtitan/models that this package does not know is found by its parallelize function. The helper
`validate_tp_compat` comes from patches/helper, in the form that fits how the checkout describes its layers.
The patch is written to DIR in `git format-patch` form; what it holds depends on the checkout alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import libcst as cst

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from torchtitan_tp_validate.locate import (  # noqa: E402
    LAYOUTS,
    REQUIRED_PARAMETERS,
    EntryPoint,
    functions_in,
    unbindable,
)
from torchtitan_tp_validate.models import FAMILY_OF  # noqa: E402
from torchtitan_tp_validate.rules import RULES  # noqa: E402
from torchtitan_tp_validate.wrappers import TARGETS  # noqa: E402

PATCHES = ROOT / "patches"
HELPER = PATCHES / "helper"
HELPER_NAME = "validate_tp_compat"
HELPER_MODULE = "torchtitan.distributed.tensor_parallel"
DECODER = "torchtitan/models/common/decoder.py"
EXPERIMENTS = "torchtitan.experiments."
TESTS = "tests/unit_tests/test_tp_compat.py"
UPSTREAM_WIDTH = 88

EARLIER_CALLS = (
    (
        "torchtitan/models/llama3/parallelize.py",
        "model_converters:",
        '"compile_config", "ac_config")',
        '"compile_config", "ac_config", "model_converters")',
    ),
    (
        "torchtitan/models/llama3/model.py",
        "trainer_config,",
        "config.update_from_config(config=SimpleNamespace(parallelism=parallelism))",
        "training = SimpleNamespace(seq_len=8)\n"
        "            run = SimpleNamespace(parallelism=parallelism, training=training)\n"
        "            config.update_from_config(trainer_config=run)",
    ),
)
"""A file, a parameter that its function had until May 2026, and how a test calls it without and with."""

AUTHOR = "torchtitan-tp-validate <maintainers@torchtitan-tp-validate.example>"
DATE = "2026-01-01T00:00:00+0000"
HEADS = {RULES[code].dim for code in ("TP001", "TP002", "TP003", "TP004")}


class CannotPatchError(Exception):
    """Something in the checkout has no place for the patch; the text names it."""


@dataclass(frozen=True)
class Generation:
    """How a torchtitan describes its layers, and so where a parallelize function finds the head counts.

    Attributes:
        name: of the reader and the unit tests in patches/helper.
        config: what a parallelize function passes to the helper.
    """

    name: str
    config: str


MODEL_ARGS = Generation("model_args", "model.model_args")
LAYER = Generation("layer", "model.config")
LAYERS = Generation("layers", "model.config")
# In every generation, torchtitan's own model around a Hugging Face one has no config of its own to ask.
TRANSFORMERS_CONFIG = "model.model.config"


@dataclass
class Patched:
    """A checkout with the changes made, in memory.

    Attributes:
        files: path -> new text of every file that changes.
        guarded: the entry points that call the helper now.
        left_alone: what looks like an entry point, or like a check, and why it is left as it is.
        unified: where torchtitan's own check of the heads gave way to the helper.
    """

    source: Path
    generation: Generation
    files: dict[str, str] = field(default_factory=dict)
    guarded: list[EntryPoint] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    unified: list[str] = field(default_factory=list)

    def tree(self, path: str) -> cst.Module:
        """The syntax tree of a file as it stands now."""
        text = self.files[path] if path in self.files else _read(self.source / path)
        return _parse(text, path)

    def change(self, path: str, tree: cst.Module) -> None:
        """Keep what a file is to become."""
        self.files[path] = tree.code


def main() -> None:
    """Make what the command line asks for, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the root of a torchtitan checkout")
    parser.add_argument("--out", type=Path, help="where to (default: patches/torchtitan-VERSION)")
    options = parser.parse_args()
    try:
        patched = patch(options.source)
        out = options.out or PATCHES / f"torchtitan-{checkout_version(options.source)}"
        written = write(patched, out)
    except CannotPatchError as error:
        raise SystemExit(f"Cannot make the patch: {error}") from None
    print(f"{len(patched.guarded)} entry points of {options.source} call {HELPER_NAME} now:")
    for line in patched.guarded:
        print(f"  {line}")
    for title, lines in (("left alone", patched.left_alone), ("now asks the helper", patched.unified)):
        for text in lines:
            print(f"{title}: {text}")
    print(f"written: {written.relative_to(ROOT) if written.is_relative_to(ROOT) else written}")


def checkout_version(source: Path) -> str:
    """The version that a checkout declares.

    Raises:
        CannotPatchError: this is no torchtitan checkout.
    """
    file = source / "assets" / "version.txt"
    if not (source / "torchtitan").is_dir() or not file.is_file():
        raise CannotPatchError(
            f"{source} is no torchtitan checkout: it has no torchtitan folder or no assets/version.txt."
        )
    return file.read_text(encoding="utf-8").strip()


def patch(source: Path) -> Patched:
    """Place the check in a checkout, in memory.

    Raises:
        CannotPatchError: naming every model whose entry point is missing or cannot be changed. An experiment
            comes and goes: one without a place for the call is left alone.
    """
    checkout_version(source)
    patched = Patched(source, _generation(source))
    if (source / TESTS).exists():
        raise CannotPatchError(f"{TESTS} is there already.")
    entry_points = list(_entry_points(patched))
    _add_helper(patched, {part for point, _ in entry_points for part in point.module.split(".")})
    problems = []
    for entry_point, config in entry_points:
        try:
            _add_call(patched, entry_point, config)
        except CannotPatchError as error:
            if entry_point.module.startswith(EXPERIMENTS):
                patched.left_alone.append(_without_a_place(patched.source, entry_point, str(error)))
            else:
                problems.append(str(error))
    if not patched.guarded and not problems:
        problems.append("it has no parallelize function under any known name.")
    if problems:
        raise CannotPatchError("\n  ".join(problems))
    _unify_config_checks(patched)
    patched.files[TESTS] = _unit_tests(patched)
    return patched


def _unit_tests(patched: Patched) -> str:
    """The helper's tests, which call Llama 3's functions by the parameters that the checkout has."""
    text = _read(HELPER / f"test_{patched.generation.name}.py")
    for file, parameter, call, earlier in EARLIER_CALLS:
        source = patched.source / file
        if source.is_file() and parameter in _read(source):
            text = text.replace(call, earlier)
    return text


def _generation(source: Path) -> Generation:
    """Told by the fields of the base class of all models' configs.

    Raises:
        CannotPatchError: none of the known ones is there.
    """
    decoder = source / DECODER
    if decoder.is_file():
        for config in _classes(_parse(_read(decoder), str(decoder)), "Decoder", "Config"):
            fields = {
                line.target.value
                for statement in config.body.body
                if isinstance(statement, cst.SimpleStatementLine)
                for line in statement.body
                if isinstance(line, cst.AnnAssign) and isinstance(line.target, cst.Name)
            }
            for generation in (LAYERS, LAYER):
                if generation.name in fields:
                    return generation
    protocol = source / "torchtitan/protocols/model.py"
    if protocol.is_file() and any(_classes(_parse(_read(protocol), str(protocol)), "BaseModelArgs")):
        return MODEL_ARGS
    raise CannotPatchError(
        "it is unknown how this torchtitan describes its layers: there is neither a Decoder.Config with "
        f"'layers' or 'layer' in {DECODER} nor a BaseModelArgs in "
        "torchtitan/protocols/model.py."
    )


def _classes(tree: cst.Module, *path: str) -> Iterator[cst.ClassDef]:
    """The class of this qualified name."""
    for statement in tree.body:
        if isinstance(statement, cst.ClassDef) and statement.name.value == path[0]:
            if len(path) == 1:
                yield statement
            else:
                yield from _classes(cst.Module(body=list(statement.body.body)), *path[1:])  # type: ignore[arg-type]


# --- the entry points --------------------------------------------------------------------------------


def _entry_points(patched: Patched) -> Iterator[tuple[EntryPoint, str]]:
    """Every entry point of the checkout, with what it passes to the helper."""
    known = set()
    for name, target in TARGETS.items():
        config = TRANSFORMERS_CONFIG if name == "transformers_backend" else patched.generation.config
        for entry_point in target.entry_points(patched.source):
            known.add(str(entry_point))
            yield entry_point, config
    for entry_point in _unknown_entry_points(patched.source, known):
        if entry_point.problem is not None:
            patched.left_alone.append(f"{entry_point}: {entry_point.problem}")
        else:
            yield entry_point, patched.generation.config


def _unknown_entry_points(source: Path, known: Set[str]) -> Iterator[EntryPoint]:
    """Every other ``parallelize_*`` function where a model under torchtitan/models keeps it."""
    models = source / "torchtitan" / "models"
    for folder in sorted(path.parent for path in models.glob("*/__init__.py")):
        for layout in LAYOUTS:
            file = folder.joinpath(*layout.split(".")).with_suffix(".py")
            if not file.is_file():
                continue
            module = f"torchtitan.models.{folder.name}.{layout}"
            for function in _parse(_read(file), str(file)).body:
                if not isinstance(function, cst.FunctionDef):
                    continue
                name = function.name.value
                if not name.startswith("parallelize_") or f"{module}.{name}" in known:
                    continue
                problem = unbindable(name, tuple(_parameters(function)))
                if problem is None and not _mentions_heads(folder):
                    problem = "its model has no n_heads that could be checked"
                yield EntryPoint(module, name, problem)


def _without_a_place(source: Path, entry_point: EntryPoint, reason: str) -> str:
    """Why an experiment is left alone, and where in its package the function seems to have gone."""
    package = next(
        entry_point.module.removesuffix(f".{layout}")
        for layout in sorted(LAYOUTS, key=len, reverse=True)
        if entry_point.module.endswith(f".{layout}")
    )
    elsewhere = [
        file.relative_to(source).as_posix()
        for file in sorted((source / package.replace(".", "/")).rglob("*.py"))
        if entry_point.problem is not None and entry_point.function in functions_in(file)
    ]
    return f"{reason.rstrip('.')}; {' and '.join(elsewhere)} defines it" if elsewhere else reason.rstrip(".")


def _parameters(function: cst.FunctionDef) -> Iterator[str]:
    parameters = function.params
    for parameter in (*parameters.posonly_params, *parameters.params, *parameters.kwonly_params):
        yield parameter.name.value


def _mentions_heads(package: Path) -> bool:
    texts = {str(file): _read(file) for file in sorted(package.rglob("*.py"))}
    return any("n_heads" in text and "n_heads" in _names(_parse(text, file)) for file, text in texts.items())


def _add_call(patched: Patched, entry_point: EntryPoint, config: str) -> None:
    """Have a parallelize function ask the helper before anything else."""
    if entry_point.problem is not None:
        raise CannotPatchError(f"{entry_point}: {entry_point.problem}.")
    path = f"{entry_point.module.replace('.', '/')}.py"
    tree = patched.tree(path)
    body = list(tree.body)
    (index,) = [
        position
        for position, statement in enumerate(body)
        if isinstance(statement, cst.FunctionDef) and statement.name.value == entry_point.function
    ][-1:]
    function = cst.ensure_type(body[index], cst.FunctionDef)
    absent = set(REQUIRED_PARAMETERS) - set(_parameters(function))
    if absent:
        raise CannotPatchError(f"{entry_point} takes {' and '.join(sorted(absent))} through * or **.")
    if not isinstance(function.body, cst.IndentedBlock):
        raise CannotPatchError(f"{entry_point} has its body on the line of its def.")
    call = cst.parse_statement(f"{HELPER_NAME}({config}, parallel_dims.tp)")
    start = 0 if function.get_docstring() is None else 1
    statements = [*function.body.body[:start], call, *function.body.body[start:]]
    body[index] = function.with_changes(body=function.body.with_changes(body=statements))
    patched.change(path, _with_import(tree.with_changes(body=body), path))
    patched.guarded.append(entry_point)


# --- the helper --------------------------------------------------------------------------------------


def _add_helper(patched: Patched, packages: Set[str]) -> None:
    """Put the helper, with the names of the models in ``packages``, where torchtitan keeps its TP code."""
    path = f"{HELPER_MODULE.replace('.', '/')}.py"
    if not (patched.source / path).is_file():
        raise CannotPatchError(f"there is no {path} to put {HELPER_NAME} in.")
    tree = patched.tree(path)
    if any(_defines(statement, HELPER_NAME) for statement in tree.body):
        raise CannotPatchError(f"{path} defines {HELPER_NAME} already.")
    names = {package: family.title for package, family in FAMILY_OF.items() if package in packages}
    table = "\n".join(f'    "{package}": "{name}",' for package, name in names.items())
    reader = _functions(HELPER / f"read_{patched.generation.name}.py")
    rule = _functions(HELPER / "rule.py")
    functions = "\n\n\n".join((rule[0], *reader, *rule[1:]))
    constant = f"# For error messages.\n_MODEL_NAMES = {{\n{table}\n}}"
    code = f"{tree.code.rstrip()}\n\n\n{constant}\n\n\n{functions}\n"
    patched.change(path, _insert_import(_parse(code, path), cst.parse_statement("import math"), path))


def _functions(file: Path) -> list[str]:
    """The source of each function in a file of patches/helper."""
    module = _parse(_read(file), str(file))
    return [module.code_for_node(x).strip() for x in module.body if isinstance(x, cst.FunctionDef)]


def _defines(statement: cst.CSTNode, name: str) -> bool:
    return isinstance(statement, cst.FunctionDef) and statement.name.value == name


# --- torchtitan's own check --------------------------------------------------------------------------


def _unify_config_checks(patched: Patched) -> None:
    """Have the checks of head counts in ``update_from_config`` ask the helper, so that one rule is left."""
    files = (patched.source / "torchtitan" / "models").rglob("*.py")
    paths = {file.relative_to(patched.source).as_posix() for file in files if "must divide" in _read(file)}
    base_asks = False
    for path in sorted(paths, key=lambda path: (path != DECODER, path)):
        unifier = _Unifier(path, base_asks=base_asks)
        tree = patched.tree(path)
        changed = tree.visit(unifier)
        patched.left_alone += unifier.left_alone
        patched.unified += unifier.unified
        if unifier.needs_helper:
            changed = _with_import(changed, path)
        if unifier.unified:
            patched.change(path, changed)
        base_asks |= path == DECODER and unifier.needs_helper


class _Unifier(cst.CSTTransformer):
    """Replaces the ``if`` in which an ``update_from_config`` refuses head counts.

    A subclass that calls its base's ``update_from_config`` needs no check of its own when the decoder,
    the base of them all, asks the helper.
    """

    def __init__(self, path: str, *, base_asks: bool) -> None:
        super().__init__()
        self.path = path
        self.base_asks = base_asks
        self.unified: list[str] = []
        self.left_alone: list[str] = []
        self.needs_helper = False
        self._class: list[str] = []

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self._class.append(node.name.value)

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        self._class.pop()
        return updated_node

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef:
        block = updated_node.body
        if updated_node.name.value != "update_from_config" or not isinstance(block, cst.IndentedBlock):
            return updated_node
        statements = list(block.body)
        checks = [x for x in statements if isinstance(x, cst.If) and any(_refusals(x))]
        where = f"{'.'.join(self._class)}.update_from_config in {self.path}"
        if len(checks) != 1:
            return updated_node
        (check,) = checks
        if not all(_refusals(check)):
            self.left_alone.append(f"{where} refuses other things than head counts too")
            return updated_node
        asks_itself = not (self.base_asks and any(_calls_base(x) for x in statements if x is not check))
        job = _job_parameter(original_node)
        if asks_itself and job is None:
            self.left_alone.append(f"{where} has no parameter whose .parallelism it reads")
            return updated_node
        position = statements.index(check)
        statements.remove(check)
        leading_lines = check.leading_lines
        while position and _assigns_unused(statements[position - 1], statements):
            position -= 1
            leading_lines = cst.ensure_type(statements.pop(position), cst.SimpleStatementLine).leading_lines
        self.unified.append(where)
        if asks_itself:
            self.needs_helper = True
            call = f"{HELPER_NAME}(self, {job}.parallelism.tensor_parallel_degree)"
            line = cst.ensure_type(cst.parse_statement(call), cst.SimpleStatementLine)
            statements.insert(position, line.with_changes(leading_lines=leading_lines))
        return updated_node.with_changes(body=block.with_changes(body=statements))


def _job_parameter(function: cst.FunctionDef) -> str | None:
    """The parameter that holds the job's config, by what the body reads of it.

    Its name is upstream's to change: ``config``, and ``trainer_config`` for some months of main.
    """
    names = set(_parameters(function))
    for node in _nodes(function.body):
        if (
            isinstance(node, cst.Attribute)
            and node.attr.value == "parallelism"
            and isinstance(node.value, cst.Name)
            and node.value.value in names
        ):
            return node.value.value
    return None


def _refusals(check: cst.If) -> list[bool]:
    """For each error that it raises, whether that is about a head count that the helper reads."""

    class Finder(cst.CSTVisitor):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[bool] = []

        def visit_Raise(self, node: cst.Raise) -> None:
            code = cst.Module(body=[cst.SimpleStatementLine([node])]).code
            self.found.append("must divide" in code and not HEADS.isdisjoint(_names(node)))

    finder = Finder()
    check.visit(finder)
    return finder.found


def _assigns_unused(statement: cst.CSTNode, statements: Sequence[cst.CSTNode]) -> bool:
    """Whether it is a plain ``name = ...`` whose name no other statement mentions."""
    if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) != 1:
        return False
    assign = statement.body[0]
    if not isinstance(assign, cst.Assign) or len(assign.targets) != 1:
        return False
    target = assign.targets[0].target
    if not isinstance(target, cst.Name):
        return False
    others = (x for x in statements if x is not statement)
    return not any(target.value == name for other in others for name in _names(other))


def _names(node: cst.CSTNode) -> Iterator[str]:
    return (inner.value for inner in _nodes(node) if isinstance(inner, cst.Name))


def _nodes(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """A node and all below it, in the order of the source."""
    yield node
    for child in node.children:
        yield from _nodes(child)


def _calls_base(node: cst.CSTNode) -> bool:
    return any(
        isinstance(inner, cst.Call)
        and isinstance(inner.func, cst.Attribute)
        and inner.func.attr.value == "update_from_config"
        for inner in _nodes(node)
    )


# --- imports -----------------------------------------------------------------------------------------


def _with_import(tree: cst.Module, path: str) -> cst.Module:
    """The module with the helper imported, beside what it imports from the same place already."""
    body = list(tree.body)
    for index, statement in enumerate(body):
        imported = _import_of(statement)
        if isinstance(imported, cst.ImportFrom) and _sort_key(imported)[3] == HELPER_MODULE:
            line = cst.ensure_type(statement, cst.SimpleStatementLine)
            body[index] = _import_helper_beside(line, imported)
            return tree.with_changes(body=body)
    new = cst.parse_statement(f"from {HELPER_MODULE} import {HELPER_NAME}")
    return _insert_import(tree, new, path)


def _import_helper_beside(line: cst.SimpleStatementLine, imported: cst.ImportFrom) -> cst.SimpleStatementLine:
    if isinstance(imported.names, cst.ImportStar):
        return line
    empty = cst.Module(body=[])
    names = {
        empty.code_for_node(alias.with_changes(comma=cst.MaybeSentinel.DEFAULT)) for alias in imported.names
    }
    ordered = sorted({*names, HELPER_NAME}, key=str.casefold)
    code = f"from {HELPER_MODULE} import {', '.join(ordered)}"
    if len(code) > UPSTREAM_WIDTH:
        code = f"from {HELPER_MODULE} import (\n    {(',' + chr(10) + '    ').join(ordered)},\n)"
    new = cst.ensure_type(cst.parse_statement(code), cst.SimpleStatementLine)
    return new.with_changes(leading_lines=line.leading_lines, trailing_whitespace=line.trailing_whitespace)


def _insert_import(tree: cst.Module, new: cst.BaseStatement, path: str) -> cst.Module:
    """Put an import where usort would: after the last one that sorts before it, in a block of its kind."""
    body = list(tree.body)
    imports = [(index, x) for index, x in enumerate(map(_import_of, body)) if x is not None]
    if any(x.deep_equals(_import_of(new)) for _, x in imports):  # type: ignore[arg-type]
        return tree
    if not imports:
        raise CannotPatchError(f"{path} imports nothing: there is no place for an import in it.")
    added = _import_of(new)
    assert added is not None
    key = _sort_key(added)
    before = [(index, _sort_key(x)) for index, x in imports if _sort_key(x) <= key]
    position = before[-1][0] + 1 if before else imports[0][0]
    line = cst.ensure_type(new, cst.SimpleStatementLine)
    blank = [cst.EmptyLine(indent=False)]
    continues_block = bool(before) and before[-1][1][0] == key[0]
    following = next((_sort_key(x) for index, x in imports if index == position), None)
    if following is not None and not continues_block:
        # It opens a block: the gap above is its own now, and it needs one below if that is another block.
        successor = cst.ensure_type(body[position], cst.SimpleStatementLine)
        line = line.with_changes(leading_lines=successor.leading_lines)
        gap = [] if following[0] == key[0] else blank
        body[position] = successor.with_changes(leading_lines=gap)
    elif not continues_block:
        line = line.with_changes(leading_lines=blank)
    body.insert(position, line)
    return tree.with_changes(body=body)


def _import_of(statement: cst.CSTNode) -> cst.Import | cst.ImportFrom | None:
    if isinstance(statement, cst.SimpleStatementLine) and len(statement.body) == 1:
        small = statement.body[0]
        if isinstance(small, (cst.Import, cst.ImportFrom)):
            return small
    return None


def _sort_key(imported: cst.Import | cst.ImportFrom) -> tuple[int, bool, str, str]:
    """usort's order: by kind, ``import x`` before ``from x import``, and by name."""
    is_from = isinstance(imported, cst.ImportFrom)
    if isinstance(imported, cst.ImportFrom):
        name = cst.Module(body=[]).code_for_node(imported.module) if imported.module else ""
        relative = bool(imported.relative)
    else:
        name, relative = cst.Module(body=[]).code_for_node(imported.names[0].name), False
    root = name.partition(".")[0]
    kinds = (root == "__future__", root in sys.stdlib_module_names, root != "torchtitan", True)
    return 4 if relative else kinds.index(True), is_from, name.casefold(), name


# --- files and git -----------------------------------------------------------------------------------


def _read(file: Path) -> str:
    return file.read_bytes().decode("utf-8")


def _parse(text: str, path: str) -> cst.Module:
    try:
        return cst.parse_module(text)
    except cst.ParserSyntaxError as error:
        raise CannotPatchError(
            f"{path} cannot be parsed: {error.message} in line {error.raw_line}."
        ) from None


def write(patched: Patched, out: Path) -> Path:
    """Write the patch as git makes it of the change; the patch file.

    An older one in the folder is replaced; the mends of faults, which are written by hand, stay.
    """
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch)
        _git(repository, "init", "--quiet", ".")
        for path in patched.files:
            if (patched.source / path).exists():
                _put(repository / path, (patched.source / path).read_bytes())
        _git(repository, "add", "--all", "--force")
        _git(repository, "commit", "--quiet", "--allow-empty", "--message", "before")
        for path, text in patched.files.items():
            _put(repository / path, text.encode("utf-8"))
        _git(repository, "add", "--all", "--force")
        unified = _read(HELPER / "message_config_check.txt") if patched.unified else ""
        message = f"{_read(HELPER / 'message.txt')}\n{unified}\nSigned-off-by: {AUTHOR}\n"
        _git(repository, "commit", "--quiet", "--message", message)
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("0001-*.patch"):
            old.unlink()
        # One line of context: it finds its place in a pristine file, and hits little of a changed one.
        how = ("-1", "--unified=1", "--zero-commit", "--full-index", "--no-signature", "--no-stat")
        name = _git(repository, "format-patch", *how, "--output-directory", str(out.resolve()))
    return out / Path(name.strip()).name


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _git(repository: Path, *arguments: str) -> str:
    """Run git as it is without anybody's settings."""
    name, email = AUTHOR.rstrip(">").split(" <")
    people = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", name), ("EMAIL", email), ("DATE", DATE))
    }
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env = {**clean, **people, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
