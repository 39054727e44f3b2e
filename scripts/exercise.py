"""Call every function that a patch changed, and tell what each did; apply_patches.py starts it.

    python scripts/exercise.py REQUEST

It runs in the checkout's own Python, with the checkout first on its path, and takes nothing of this project.
REQUEST is JSON: the checkout, the helper's file and name, how its refusal begins, and the changed functions
as ``[path, qualified name]``. One line of JSON, after `TOLD`, is printed for each.

A function is called where its module imports. Where that fails, or where it stumbles over our stand-ins
before it comes to its check, it is called in a copy of its module for which everything that it imports,
other changed files and the standard library aside, is a stand-in: the code that runs is the patch's own,
whatever is installed.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import dataclasses
import gc
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

TOLD = "told: "
TP = 4
N_HEADS, N_KV_HEADS = 8, 2


class _Lenient(type):
    """A class in the place of whatever the code at hand imports: a module, a class or a function."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Lenient(name, (StandIn,), {})

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__


class StandIn(metaclass=_Lenient):
    """Takes part in everything and means nothing: it is false, empty, zero and in no order."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return another one."""
        return StandIn()

    def __getitem__(self, key: Any) -> Any:
        return StandIn()

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return False

    def __len__(self) -> int:
        return 0

    def __int__(self) -> int:
        return 0

    def __float__(self) -> float:
        return 0.0

    def __index__(self) -> int:
        return 0

    def __format__(self, spec: str) -> str:
        return "stand-in"

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __lt__(self, other: object) -> bool:
        return False

    __gt__ = __le__ = __ge__ = __contains__ = __lt__

    def __add__(self, other: Any) -> Any:
        return self

    __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __floordiv__ = __mod__ = __add__


def stand_in_config(cls: Any = StandIn) -> Any:
    """A model's config in the shape of every generation at once: TP 2 fits it, and TP 4 does not."""
    if not issubclass(cls, StandIn):
        methods = {"__getattr__": StandIn.__getattr__, "__module__": cls.__module__}
        cls = type(cls)(cls.__name__, (cls,), {**methods, "__qualname__": cls.__qualname__})
    config: Any = object.__new__(cls)
    heads = {"n_heads": N_HEADS, "n_kv_heads": N_KV_HEADS}
    layer = StandIn(attention=StandIn(**heads), delta_net=None)
    for name, value in {"layers": [layer], "mtp_layers": [], "layer": layer, **heads}.items():
        object.__setattr__(config, name, value)
    return config


# --- modules that cannot be imported -------------------------------------------------------------------


class Copies:
    """Modules made of the changed files' own code; what else they import is a stand-in."""

    def __init__(self, checkout: Path, paths: set[str]) -> None:
        self._files = {module_name(path): checkout / path for path in paths}
        self._made: dict[str, ModuleType] = {}

    def module(self, name: str) -> ModuleType:
        """The copy of a changed file, made when it is first wanted."""
        if name not in self._made:
            file = self._files[name]
            module = self._made[name] = ModuleType(name)
            module.__package__ = name.rpartition(".")[0]
            module.__dict__["__builtins__"] = {
                **vars(builtins),
                "__import__": self._import,
                "isinstance": _is_instance,
            }
            body = ast.parse(file.read_text(encoding="utf-8")).body
            # Twice: what imports each other in a circle finds the functions there.
            for statement in [*(x for x in body if isinstance(x, ast.FunctionDef)), *body]:
                self._execute(statement, module, str(file))
        return self._made[name]

    def _execute(self, statement: ast.stmt, module: ModuleType, file: str) -> None:
        """Take over imports, definitions and plain values; what else the module does at its import is not."""
        for node in ast.walk(statement):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                # A decorator of stand-ins would put one in the place of the code.
                node.decorator_list = []
        if isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) or _is_plain(
            statement
        ):
            # compile() inherits from this file that annotations are left as they are.
            code = compile(ast.Module([statement], []), file, "exec")
            # What cannot be made of stand-ins is one itself.
            with contextlib.suppress(Exception):
                exec(code, module.__dict__)
        for name in _bound(statement):
            module.__dict__.setdefault(name, _Lenient(name, (StandIn,), {}))

    def _import(
        self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        if level:
            package = (globals or {})["__package__"].split(".")
            name = ".".join([*package[: len(package) - level + 1], *filter(None, [name])])
        if name.partition(".")[0] in sys.stdlib_module_names:
            return importlib.__import__(name, globals, locals, fromlist, 0)
        if name in self._files and fromlist:
            return self.module(name)
        return _Lenient(name, (StandIn,), {})


def _is_plain(statement: ast.stmt) -> bool:
    """Whether it names a value that is written out, as the helper's table of names is."""
    try:
        return isinstance(statement, ast.Assign) and ast.literal_eval(statement.value) is not None
    except ValueError:
        return False


def _bound(statement: ast.stmt) -> Iterator[str]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]


# --- calls -----------------------------------------------------------------------------------------------

Places = set[tuple[str, int]]
"""``(file, line)``."""


class Exercise:
    """Everything that a patch changed, and the lines of it that have been run."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._checkout = Path(request["checkout"])
        self._helper_path, self._helper = request["helper"]
        self._headline = request["headline"]
        self._copies = Copies(self._checkout, {path for path, _ in request["changed"]})
        self._run: Places = set()

    def tell(self, path: str, name: str, *, where_it_lives: bool) -> dict[str, Any]:
        """What one function did: its ``state``, a ``text``, and why it was not called where it lives."""
        told: dict[str, Any] = {"path": path, "name": name, "problem": None, "why": None}
        outcome = None
        if where_it_lives:
            try:
                module = importlib.import_module(module_name(path))
            except ModuleNotFoundError as error:
                is_ours = (error.name or "").partition(".")[0] == "torchtitan"
                told |= {"problem": str(error), "why": "import" if is_ours else "package"}
            except (Exception, SystemExit) as error:
                told |= {"problem": described(error), "why": "import"}
            else:
                outcome = self._try(path, name, module)
        if outcome is None or outcome[0] == "unreached":
            outcome = self._try(path, name, self._copies.module(module_name(path)))
        told["state"], told["text"] = outcome
        return told

    def _try(self, path: str, name: str, module: ModuleType) -> tuple[str, str]:
        owner: Any = module
        *owners, last = name.split(".")
        try:
            for part in owners:
                owner = getattr(owner, part)
            function = inspect.unwrap(inspect.getattr_static(owner, last))
        except AttributeError:
            return "gone", "its module, imported, does not hold it"
        code = getattr(function, "__code__", None)
        if code is None or not Path(code.co_filename).samefile(self._checkout / path):
            return "gone", "something else stands under its name"
        if path == self._helper_path and last != self._helper:
            return self._try_part(path, name, function)
        if path == self._helper_path:
            fits = {**_arguments(function, None), "tp": N_KV_HEADS}
            refusal, _ = self._call(function, fits)
            if refusal is not None:
                return "silent", f"TP {N_KV_HEADS}, which fits: {described(refusal)}"
        error, ran = self._call(function, _arguments(function, owner if owners else None))
        if isinstance(error, ValueError) and str(error).startswith(self._headline):
            return "fires", str(error)
        if error is None:
            return "silent", "it returns"
        check = self._check(path, name) | self._body(self._helper_path, self._helper)
        return ("silent" if check & ran else "unreached"), described(error)

    def _try_part(self, path: str, name: str, function: Any) -> tuple[str, str]:
        """Call a function that the helper is made of, unless the helper has called it."""
        if not self._body(path, name) & self._run:
            error, _ = self._call(function, _arguments(function, None))
            if error is not None:
                return "unreached", described(error)
        return "runs", ""

    def _call(self, function: Any, arguments: dict[str, Any]) -> tuple[Exception | None, Places]:
        """The error that came of a call, and the lines that it went through."""
        ran: Places = set()
        positional = [
            arguments.pop(parameter.name)
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is parameter.POSITIONAL_ONLY
        ]
        try:
            with _traced(str(self._checkout), ran), _lenient_builtins():
                function(*positional, **arguments)
        except Exception as error:
            return error, ran
        finally:
            self._run |= ran
        return None, ran

    def _check(self, path: str, name: str) -> Places:
        """Where a function calls the helper."""
        return {
            (str(self._checkout / path), line)
            for node in ast.walk(self._node(path, name))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == self._helper
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }

    def _body(self, path: str, name: str) -> Places:
        body = self._node(path, name).body
        lines = range(body[0].lineno, (body[-1].end_lineno or body[-1].lineno) + 1)
        return {(str(self._checkout / path), line) for line in lines}

    def _node(self, path: str, name: str) -> ast.FunctionDef:
        return functions_of((self._checkout / path).read_text(encoding="utf-8"))[name]


def _arguments(function: Any, owner: type | None) -> dict[str, Any]:
    """What a function takes: of a method's, the job's config asks for TP 4; of others', the name tells."""
    names = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if owner is not None:
        job = StandIn(parallelism=StandIn(tensor_parallel_degree=TP))
        return {**dict.fromkeys(names, job), names[0]: stand_in_config(owner)}
    config = stand_in_config()
    known = {
        "model": SimpleNamespace(model_args=config, config=config, model=SimpleNamespace(config=config)),
        "parallel_dims": SimpleNamespace(tp=TP),
        "tp": TP,
        "config": config,
        "model_args": config,
    }
    return {name: known.get(name) for name in names}


@contextlib.contextmanager
def _traced(folder: str, ran: Places) -> Iterator[None]:
    """Note the lines of the folder's files that are run."""

    def note(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(folder):
            return None
        if event == "line":
            ran.add((frame.f_code.co_filename, frame.f_lineno))
        return note

    sys.settrace(note)
    try:
        yield
    finally:
        sys.settrace(None)


@contextlib.contextmanager
def _lenient_builtins() -> Iterator[None]:
    """Let a stand-in be an instance of whatever is asked for."""
    builtins.isinstance = _is_instance
    try:
        yield
    finally:
        builtins.isinstance = _isinstance


_isinstance = isinstance
_replace = dataclasses.replace


def _is_instance(value: Any, kind: Any) -> bool:
    return _isinstance(value, kind) or (
        issubclass(type(value), StandIn) and getattr(kind, "__module__", "") != "builtins"
    )


def _replaced(value: Any, /, **changes: Any) -> Any:
    return value if _isinstance(value, StandIn) else _replace(value, **changes)


# --- what both scripts need ----------------------------------------------------------------------------


def functions_of(text: str) -> dict[str, ast.FunctionDef]:
    """Qualified name -> definition, of the functions in a source text and in its classes."""

    def below(nodes: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                yield from below(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                yield f"{prefix}{node.name}", node

    return dict(below(ast.parse(text).body, ""))


def module_name(path: str) -> str:
    """The module that a file of a checkout is."""
    return path.removesuffix(".py").replace("/", ".")


def described(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def main() -> None:
    """Call everything that the request names."""
    gc.disable()  # what is imported stays
    request = json.loads(sys.argv[1])
    # torchtitan's methods make copies of configs by it.
    dataclasses.replace = _replaced
    exercise = Exercise(request)
    for path, name in request["pending"]:
        told = exercise.tell(path, name, where_it_lives=[path, name] not in request["alone"])
        # What is imported may print too, and stop in the middle of a line.
        print(f"\n{TOLD}{json.dumps(told)}", flush=True)


if __name__ == "__main__":
    main()
