#!/usr/bin/env python
"""Put the check into a torchtitan checkout, or take it out again.

    scripts/apply_patches.py CHECKOUT            apply the patch of its version, and see the guard fire
    scripts/apply_patches.py CHECKOUT --check    only say whether that would work
    scripts/apply_patches.py CHECKOUT --reverse  restore every file as it was
    scripts/apply_patches.py CHECKOUT --mend 0002 0003
                                                 the mends of faults instead, by the numbers of their
                                                 patches (or all); --check and --reverse go with it

Run it by a Python that this torchtitan imports in. Every function that the patch changed is called there:
what does not import is called with stand-ins for what it imports. The exit status is 0 when all of them
refuse what does not fit, 3 when the patch is applied and some could not be shown to (each is named), and 1
when nothing was changed.

A checkout is only touched when every file that the patch changes is, byte for byte, the one that the patch
was made for; when anything fails, it is left as it was found. For any other tree, make its own patch first:

    scripts/make_patches.py --source CHECKOUT --out DIR
    scripts/apply_patches.py CHECKOUT --patches DIR

The check and the mends go in and out in any order. What a mend does is shown by its unit test, which is not
run here.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from exercise import TOLD, functions_of, module_name  # noqa: E402

EXERCISE = ROOT / "scripts" / "exercise.py"
PATCHES = ROOT / "patches"
GUARD = "0001-*.patch"
"""The file of the check; the other patches in its folder mend faults."""
HELPER_NAME = "validate_tp_compat"
HELPER_PATH = "torchtitan/distributed/tensor_parallel.py"
HEADLINE = "Tensor parallel degree (4) must divide n_kv_heads (2). For "
ABSENT = "0" * 40

INCOMPLETE = 3


class CannotApplyError(Exception):
    """The checkout is not as it must be; the text says what is, and what to do."""


class Report:
    """What there is to tell.

    Attributes:
        lines: of text.
        complete: whether everything that was changed was called, and its module imported as far as the
            packages go that are installed here.
    """

    def __init__(self, *lines: str, complete: bool = True) -> None:
        self.lines = lines
        self.complete = complete


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
    parser.add_argument(
        "--mend", nargs="+", metavar="NUMBER", help="the mends of faults with these numbers, or all"
    )
    options = parser.parse_args()
    call = run if options.mend is None else functools.partial(mend, numbers=options.mend)
    try:
        report = call(options.checkout, options.patches, check=options.check, reverse=options.reverse)
    except CannotApplyError as error:
        raise SystemExit(f"Nothing was changed: {error}") from None
    print("\n".join(report.lines))
    if not report.complete:
        sys.exit(INCOMPLETE)


def run(checkout: Path, folder: Path | None, *, check: bool, reverse: bool) -> Report:
    """Apply or reverse, or only check; what there is to tell.

    Raises:
        CannotApplyError: the tree is unknown or dirty, or the guard does not fire. It is as it was.
    """
    patch = _patch_file(checkout, folder)
    changes = read_changes(patch)
    tree = _take_apart(checkout, _mends(patch.parent), changes)
    _raise_if_changed_files(checkout, changes, patch, tree.blobs, reverse=reverse)
    _raise_if_dirty_repository(checkout, [*changes, *tree.changes])
    verb = "reversed" if reverse else "applied"
    count = f"{len(changes)} files of {checkout}"
    flags = ["--reverse"] if reverse else []
    _git_apply(checkout, patch, flags=["--check", *flags])
    if check:
        return Report(
            f"{_shown(patch)} can be {verb}: {len(changes)} files of {checkout} are as it needs them."
        )
    before = _functions(checkout, changes)
    _git_apply(checkout, patch, flags=flags)
    if reverse:
        return Report(f"{_shown(patch)} is reversed: {count} are as they were.")
    try:
        changed = [
            place for place, code in _functions(checkout, changes).items() if before.get(place) != code
        ]
        told = exercise(checkout, changed)
        _raise_if_silent(told)
    except BaseException:
        _git_apply(checkout, patch, flags=["--reverse"])
        raise
    _raise_if_broken_imports(checkout, patch, told)
    return _report(f"{_shown(patch)} is applied: {count} are changed.", told)


def mend(
    checkout: Path, folder: Path | None, *, check: bool, reverse: bool, numbers: Sequence[str]
) -> Report:
    """Apply or reverse the mends of faults, or only check; what there is to tell.

    Args:
        numbers: of their patches, or ``all``: then those that are not applied yet (that are, to reverse).

    Raises:
        CannotApplyError: a number or the tree is unknown, or the tree is dirty. It is as it was.
    """
    guard = _patch_file(checkout, folder)
    known = {patch.name[:4]: patch for patch in _mends(guard.parent)}
    unknown = [number for number in numbers if number not in known and number != "all"]
    if unknown or not known:
        raise CannotApplyError(
            f"there is no mend {', '.join(unknown) or 'at all'} in {_shown(guard.parent)} "
            f"(there are {', '.join(known) or 'none'})."
        )
    changes = {patch: read_changes(patch) for patch in (guard, *known.values())}
    tree = _take_apart(checkout, [*changes], [change for some in changes.values() for change in some])
    chosen = [known[number] for number in sorted(known if "all" in numbers else set(numbers))]
    pending = [patch for patch in chosen if (patch in tree.applied) is reverse]
    said = "not applied" if reverse else "applied already"
    if not pending or ("all" not in numbers and len(pending) < len(chosen)):
        patches = ", ".join(str(_shown(patch)) for patch in chosen if patch not in pending)
        raise CannotApplyError(f"{patches}: {said}.")
    needed = [change for patch in pending for change in changes[patch]]
    strange = sorted({change.path for change in needed if tree.blobs[change.path] != change.before})
    if strange:
        raise CannotApplyError(
            f"{checkout} is not the tree that the patches in {_shown(guard.parent)} were made for. "
            f"These files differ: {', '.join(strange)}. Undo the changes in them, or mend them by hand."
        )
    _raise_if_dirty_repository(checkout, [*needed, *tree.changes])
    flags = ["--reverse"] if reverse else []
    _git_apply(checkout, *pending, flags=["--check", *flags] if check else flags)
    verb = "reversed" if reverse else "applied"
    told = f"can be {verb}" if check else f"is {verb}"
    return Report(*(f"{_shown(patch)} {told}." for patch in pending))


def _mends(folder: Path) -> list[Path]:
    return sorted(set(folder.glob("0*.patch")) - set(folder.glob(GUARD)))


@dataclass(frozen=True)
class Tree:
    """What a checkout is without the patches that are applied to it.

    Attributes:
        applied: these patches.
        blobs: path -> git blob of a file without them.
    """

    applied: tuple[Path, ...]
    blobs: dict[str, str]

    @property
    def changes(self) -> list[Change]:
        """What the applied patches change."""
        return [change for patch in self.applied for change in read_changes(patch)]


def _take_apart(checkout: Path, patches: Sequence[Path], changes: Sequence[Change]) -> Tree:
    """Find which of some patches are applied, and what the files of ``changes`` are without them."""
    paths = {change.path for change in changes}
    every = paths | {change.path for patch in patches for change in read_changes(patch)}
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for path in every:
            if (checkout / path).is_file():
                (copy / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkout / path, copy / path)
        applied = tuple(
            patch
            for patch in patches
            if not _git(copy, "apply", "--reverse", "--whitespace=nowarn", str(patch.resolve())).returncode
        )
        return Tree(applied, {path: _blob(copy / path) for path in paths})


def _patch_file(checkout: Path, folder: Path | None) -> Path:
    version_file = checkout / "assets" / "version.txt"
    if not (checkout / "torchtitan").is_dir() or not version_file.is_file():
        raise CannotApplyError(
            f"{checkout} is no torchtitan checkout: it has no torchtitan folder or no assets/version.txt."
        )
    version = version_file.read_text(encoding="utf-8").strip()
    folder = folder or PATCHES / f"torchtitan-{version}"
    patches = sorted(folder.glob(GUARD))
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


def _raise_if_changed_files(
    checkout: Path, changes: list[Change], patch: Path, states: dict[str, str], *, reverse: bool
) -> None:
    """Refuse a tree in which a file is not, mends aside, the very one that the patch was made for."""
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


def _raise_if_dirty_repository(checkout: Path, changes: list[Change]) -> None:
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


def _git_apply(checkout: Path, *patches: Path, flags: Sequence[str] = ()) -> None:
    """All of the patches or, when any of them does not fit, nothing."""
    files = [str(patch.resolve()) for patch in patches]
    result = _git(checkout, "apply", "--whitespace=nowarn", *flags, *files)
    if result.returncode:
        raise CannotApplyError(f"git apply says: {result.stderr.strip()}")


def _git(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A repository further up would make git look for the patch's paths there.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(checkout.resolve().parent)}
    return subprocess.run(["git", *arguments], cwd=checkout, env=env, capture_output=True, text=True)


# --- what the patched code does ------------------------------------------------------------------------

Place = tuple[str, str]
"""The path of a file in the checkout, and the qualified name of a function in it."""


def _functions(checkout: Path, changes: list[Change]) -> dict[Place, str]:
    """The code of every function of torchtitan's in the files that the patch changes."""
    return {
        (change.path, name): ast.dump(node)
        for change in changes
        if Path(change.path).parts[0] == "torchtitan" and (checkout / change.path).exists()
        for name, node in functions_of((checkout / change.path).read_text(encoding="utf-8")).items()
    }


@dataclass(frozen=True)
class Told:
    """What one changed function did when it was called with TP 4 and 2 KV heads.

    Attributes:
        state: ``fires``, ``runs`` (a part of the helper), ``silent``, ``unreached`` (not run as far as its
            check) or ``gone`` (its name stands for nothing of the patch's).
        text: its refusal, or what it did instead.
        problem: why it was not called in its own module, or None.
        why: ``package`` when that wants a package that is not installed here, ``import`` when it fails to
            import otherwise.
    """

    path: str
    name: str
    state: str
    text: str
    problem: str | None
    why: str | None

    @property
    def was_run(self) -> bool:
        """Whether its code was called, and came to its check."""
        return self.state not in ("unreached", "gone")

    def __str__(self) -> str:
        return f"{module_name(self.path)}.{self.name}"


def exercise(checkout: Path, changed: Sequence[Place]) -> list[Told]:
    """Call the changed functions, in a process of their own, and in others where an import ends it.

    Raises:
        CannotApplyError: they cannot be called at all.
    """
    # The helper first: it runs its parts.
    pending = sorted(changed, key=lambda place: (place[0] != HELPER_PATH, place[1] != HELPER_NAME))
    told: list[Told] = []
    alone: dict[Place, str] = {}
    while pending:
        request = {
            "checkout": str(checkout.resolve()),
            "helper": (HELPER_PATH, HELPER_NAME),
            "headline": HEADLINE,
            "changed": changed,
            "pending": pending,
            "alone": list(alone),
        }
        result = _python(checkout, str(EXERCISE), json.dumps(request))
        lines = [line for line in result.stdout.splitlines() if line.startswith(TOLD)]
        for record in (json.loads(line.removeprefix(TOLD)) for line in lines):
            ended = alone.get((record["path"], record["name"]))
            told.append(
                Told(**record) if ended is None else Told(**{**record, "problem": ended, "why": "import"})
            )
        pending = pending[len(lines) :]
        if pending and pending[0] in alone:
            raise CannotApplyError(f"{sys.executable} cannot run what was changed: {result.stderr.strip()}")
        if pending:
            alone[pending[0]] = f"its import ends Python with status {result.returncode}"
    return told


def _raise_if_silent(told: list[Told]) -> None:
    """Refuse a patch one of whose functions does not refuse TP 4, or of which nothing was seen to."""
    silent = [f"{one} does not refuse TP 4: {one.text}" for one in told if one.state == "silent"]
    if silent:
        raise CannotApplyError("; ".join(silent))
    if not any(one.state == "fires" and one.path != HELPER_PATH for one in told):
        reasons = (f"not run: {one}: {one.text}" for one in told if not one.was_run)
        raise CannotApplyError("\n  ".join([f"{sys.executable} cannot show that the guard fires:", *reasons]))


def _raise_if_broken_imports(checkout: Path, patch: Path, told: list[Told]) -> None:
    """Take a patch out again that a module no longer imports with; one that did not before stays broken."""
    broken = {one.path: str(one.problem) for one in told if one.why == "import"}
    if not broken:
        return
    _git_apply(checkout, patch, flags=["--reverse"])
    sound = ", ".join(module_name(path) for path in broken if _imports(checkout, path))
    if sound:
        reasons = "; ".join(dict.fromkeys(broken.values()))
        raise CannotApplyError(f"with the patch, {sound} cannot be imported: {reasons}")
    _git_apply(checkout, patch)


def _imports(checkout: Path, path: str) -> bool:
    """Whether a module of the checkout can be imported."""
    return _python(checkout, "-c", f"import {module_name(path)}").returncode == 0


def _python(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with the checkout first on its path."""
    path = os.pathsep.join([str(checkout.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=checkout, env=env, capture_output=True, text=True)


def _report(headline: str, told: list[Told]) -> Report:
    fires = [one for one in told if one.state == "fires" and one.path != HELPER_PATH]
    methods = sum("." in one.name for one in fires)
    seen = f"{len(fires) - methods} entry points"
    if methods:
        seen += f" and {methods} config-time check{'s' if methods > 1 else ''}"
    # The name of the model that follows is that of our stand-in.
    lines = [f'the guard fires in {seen}: "{fires[0].text.partition(" For ")[0]}"']
    packages = [one for one in told if one.why == "package" and one.was_run]
    for problem in dict.fromkeys(one.problem for one in packages):
        names = ", ".join(str(one) for one in packages if one.problem == problem)
        lines.append(f"{problem}: called with stand-ins for what they import: {names}")
    failed = [f"not importable here: {one}: {one.problem}" for one in told if one.why == "import"]
    failed += [f"not run: {one}: {one.text}" for one in told if not one.was_run]
    return Report(headline, *lines, *failed, complete=not failed)


if __name__ == "__main__":
    main()
