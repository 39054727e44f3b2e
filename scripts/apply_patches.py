#!/usr/bin/env python
"""Put the check into a torchtitan checkout, or take it out again.

    scripts/apply_patches.py CHECKOUT            apply the patch of its version, and see the guard fire
    scripts/apply_patches.py CHECKOUT --check    only say whether that would work
    scripts/apply_patches.py CHECKOUT --reverse  restore every file as it was

Run it by a Python that this torchtitan imports in: seeing the guard fire takes torch. A checkout is only
touched when every file that the patch changes is, byte for byte, the one that the patch was made for; when
anything fails, it is left as it was found. For any other tree, make its own patch first:

    scripts/make_patches.py --source CHECKOUT --out DIR
    scripts/apply_patches.py CHECKOUT --patches DIR
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATCHES = ROOT / "patches"
HELPER_NAME = "validate_tp_compat"
HEADLINE = "Tensor parallel degree (4) must divide n_kv_heads (2). For "
ABSENT = "0" * 40

_TOLD = "told: "
# Calls every entry point with what any torchtitan's reads its heads from; the check comes before all else.
_FIRE = f"""
import importlib, inspect, json, sys
from types import SimpleNamespace as NS
heads = NS(n_heads=8, n_kv_heads=2)
layer = NS(attention=heads, delta_net=None, moe=None)
config = NS(layers=[layer], layer=layer, **vars(heads))
model = NS(model_args=heads, config=config, model=NS(config=heads))

def call(name):
    module, _, function = name.rpartition(".")
    try:
        entry_point = getattr(importlib.import_module(module), function)
    except ImportError as error:
        return "unimportable", str(error)
    others = dict.fromkeys(inspect.signature(entry_point).parameters)
    try:
        entry_point(**{{**others, "model": model, "parallel_dims": NS(tp=4)}})
    except ValueError as error:
        return "fires" if str(error).startswith({HEADLINE!r}) else "silent", str(error)
    except Exception as error:
        return "silent", repr(error)
    return "silent", "it returns"

for name in sys.argv[1:]:
    print("\\n{_TOLD}" + json.dumps([name, *call(name)]))
"""


class CannotApplyError(Exception):
    """The checkout is not as it must be; the text says what is, and what to do."""


@dataclass(frozen=True)
class Change:
    """What a patch does to one file: its git blob before and after, `ABSENT` where there is none."""

    path: str
    before: str
    after: str


def main() -> None:
    """Do what the command line asks for, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--reverse", action="store_true", help="take the patch out")
    parser.add_argument("--patches", type=Path, help="the folder with the patch, instead of its version's")
    options = parser.parse_args()
    try:
        lines = run(options.checkout, options.patches, check=options.check, reverse=options.reverse)
    except CannotApplyError as error:
        raise SystemExit(f"Nothing was changed: {error}") from None
    print("\n".join(lines))


def run(checkout: Path, folder: Path | None, *, check: bool, reverse: bool) -> list[str]:
    """Apply or reverse, or only check; what there is to tell.

    Raises:
        CannotApplyError: the tree is unknown or dirty, or the guard does not fire. It is as it was.
    """
    patch = _patch_file(checkout, folder)
    changes = read_changes(patch)
    _refuse_changed_files(checkout, changes, patch, reverse=reverse)
    _refuse_dirty_repository(checkout, changes)
    verb = "reversed" if reverse else "applied"
    flags = ["--reverse"] if reverse else []
    _git_apply(checkout, patch, "--check", *flags)
    if check:
        return [f"{_shown(patch)} can be {verb}: {len(changes)} files of {checkout} are as it needs them."]
    _git_apply(checkout, patch, *flags)
    if reverse:
        return [f"{_shown(patch)} is reversed: {len(changes)} files of {checkout} are as they were."]
    try:
        lines = fire(checkout, _guarded(checkout, changes))
    except BaseException:
        _git_apply(checkout, patch, "--reverse")
        raise
    return [f"{_shown(patch)} is applied: {len(changes)} files of {checkout} are changed.", *lines]


def _patch_file(checkout: Path, folder: Path | None) -> Path:
    version_file = checkout / "assets" / "version.txt"
    if not (checkout / "torchtitan").is_dir() or not version_file.is_file():
        raise CannotApplyError(
            f"{checkout} is no torchtitan checkout: it has no torchtitan folder or no assets/version.txt."
        )
    version = version_file.read_text(encoding="utf-8").strip()
    folder = folder or PATCHES / f"torchtitan-{version}"
    patches = sorted(folder.glob("*.patch"))
    if len(patches) != 1:
        known = ", ".join(sorted(path.name.partition("-")[2] for path in PATCHES.glob("torchtitan-*")))
        raise CannotApplyError(
            f"there is no patch for torchtitan {version} in {_shown(folder)} (there are some for {known}). "
            f"Make one: scripts/make_patches.py --source {checkout} --out DIR, and name it by --patches DIR."
        )
    return patches[0]


def _shown(path: Path) -> Path:
    """A path as people know it: ours without the folders above this project."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def read_changes(patch: Path) -> list[Change]:
    """The files that a patch changes, with the blobs that its index lines give."""
    text = patch.read_text(encoding="utf-8")
    found = re.findall(r"^diff --git a/\S+ b/(\S+)\n(?:new file.*\n)?index (\w{40})\.\.(\w{40})", text, re.M)
    return [Change(*fields) for fields in found]


def _refuse_changed_files(checkout: Path, changes: list[Change], patch: Path, *, reverse: bool) -> None:
    """Refuse a tree in which a file is not the very one that the patch was made for."""
    states = {change.path: _blob(checkout / change.path) for change in changes}
    needed = {change.path: change.after if reverse else change.before for change in changes}
    other = {change.path: change.before if reverse else change.after for change in changes}
    if states == needed:
        return
    if states == other:
        raise CannotApplyError(f"{_shown(patch)} is {'not applied' if reverse else 'applied already'}.")
    strange = [path for path, blob in states.items() if blob != needed[path]]
    raise CannotApplyError(
        f"{checkout} is not the tree that {_shown(patch)} was made for. "
        f"These files differ: {', '.join(strange)}. Undo the changes in them, or make a patch for the tree "
        f"as it is: scripts/make_patches.py --source {checkout} --out DIR, and name it by --patches DIR."
    )


def _blob(file: Path) -> str:
    """What git calls this content."""
    if not file.exists():
        return ABSENT
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _refuse_dirty_repository(checkout: Path, changes: list[Change]) -> None:
    """Refuse a git checkout with other uncommitted changes: they could no longer be told from the patch's."""
    if not (checkout / ".git").exists():
        return
    ours = [f":(exclude){change.path}" for change in changes]
    status = ("status", "--porcelain", "--untracked-files=no", "--", ".", *ours)
    dirty = [line[3:] for line in _git(checkout, *status).stdout.splitlines()]
    if dirty:
        raise CannotApplyError(
            f"{checkout} has uncommitted changes: {', '.join(dirty)}. Commit or stash them first."
        )


def _git_apply(checkout: Path, patch: Path, *flags: str) -> None:
    """All of the patch or, when any of it does not fit, nothing."""
    result = _git(checkout, "apply", "--whitespace=nowarn", *flags, str(patch.resolve()))
    if result.returncode:
        raise CannotApplyError(f"git apply says: {result.stderr.strip()}")


def _git(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A repository further up would make git look for the patch's paths there.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(checkout.resolve().parent)}
    return subprocess.run(["git", *arguments], cwd=checkout, env=env, capture_output=True, text=True)


def _guarded(checkout: Path, changes: list[Change]) -> list[str]:
    """The dotted names of the functions in changed files that call the helper."""
    names = []
    for change in changes:
        path = Path(change.path)
        if path.parts[0] != "torchtitan":
            continue
        for node in ast.parse((checkout / path).read_text(encoding="utf-8"), filename=change.path).body:
            if isinstance(node, ast.FunctionDef) and any(map(_calls_helper, node.body)):
                names.append(".".join((*path.with_suffix("").parts, node.name)))
    return names


def _calls_helper(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Call)
        and isinstance(statement.value.func, ast.Name)
        and statement.value.func.id == HELPER_NAME
    )


def fire(checkout: Path, entry_points: Sequence[str]) -> list[str]:
    """See the patched functions refuse TP 4 for 2 KV heads, in a process of their own; what there is to tell.

    Raises:
        CannotApplyError: one does not, or none could be imported.
    """
    path = os.pathsep.join([str(checkout.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", _FIRE, *entry_points]
    result = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    # What is imported may print too.
    lines = [line for line in result.stdout.splitlines() if line.startswith(_TOLD)]
    told = [json.loads(line.removeprefix(_TOLD)) for line in lines]
    by_state = {
        state: [(name, text) for name, kind, text in told if kind == state]
        for state in ("fires", "silent", "unimportable")
    }
    if by_state["silent"]:
        raise CannotApplyError(
            "; ".join(f"{name} lets TP 4 through: {text}" for name, text in by_state["silent"])
        )
    missing = [
        f"not seen, cannot be imported here: {name}: {text}" for name, text in by_state["unimportable"]
    ]
    if not by_state["fires"] or len(told) != len(entry_points):
        reason = "\n  ".join(missing) or result.stderr.strip()
        raise CannotApplyError(f"{sys.executable} cannot show that the guard fires: {reason}")
    # The name of the model that follows is that of our stand-in.
    example = by_state["fires"][0][1].partition(" For ")[0]
    return [f'the guard fires in {len(by_state["fires"])} entry points: "{example}"', *missing]


if __name__ == "__main__":
    main()
