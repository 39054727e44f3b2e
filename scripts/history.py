#!/usr/bin/env python
"""Say what torchtitan's own commits are taken for, whether they are judged right, and what is not validated.

    scripts/history.py --repository CHECKOUT [--commits 60] [--since 2025-10-17] [--out docs/history.md]
                       [--python 2025-10-01=PYTHON --python 2026-02-25=PYTHON ...] [--rows FILE]

The commits of main are spread evenly over their number. Of each it is looked up in its files, none of which
is imported, what it is told to be, which line reads it, what is read and is not there, and how many entry
points are guarded. With --python, each is judged besides, in processes of the last Python named whose date
is not after the commit's, which has this package, pytest, and a torch and all else that the commit wants:

- the verdicts on its flavors, and the guards, by scripts/judge_tree.py;
- scripts/make_patches.py and scripts/apply_patches.py, the patch's own tests and those of the tree that name
  what is changed (what fails with the patch is run without it, too), and that it comes out byte for byte.

--rows keeps what was found of each commit, which is not looked at again. The exit status is 1 where a commit
is told to be newer than it is, a verdict is wrong, a guard does not come out, or a patch breaks something.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from torchtitan_tp_validate.identity import torchtitan_identity
from torchtitan_tp_validate.releases import nearest_line, what_is_gone
from torchtitan_tp_validate.wrappers import TARGETS

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/unit_tests"
_PATIENCE_SECONDS = 600
_HEAD = """\
| commit | of | told as | read as | entry points | flavors at TP 1 to 64 | patch | not validated |
|---|---|---|---|---|---|---|---|
"""


@dataclass
class Judged:
    """How the verdicts on a commit went, its guards and its patch.

    Attributes:
        name: of the commit.
        notes: what is not validated, and why.
        wrong: what is a fault of this project.
    """

    name: str
    guards: str = ""
    verdicts: str = "-"
    patch: str = "-"
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Commit:
    """A commit of main, and what it is taken for; `notes` and `wrong` as in `Judged`."""

    name: str
    date: str
    told: str
    line: str
    guarded: int
    notes: tuple[str, ...]
    wrong: tuple[str, ...]
    judged: Judged

    def row(self, numbers: dict[str, int]) -> str:
        """The row of the table; reasons are numbered as they come, and said below it."""
        judged, notes = self.judged, dict.fromkeys((*self.notes, *self.judged.notes))
        left_out = ", ".join(str(numbers.setdefault(note, len(numbers) + 1)) for note in notes) or "-"
        points = f"{self.guarded}{judged.guards}"
        cells = (self.name, self.date, self.told, self.line, points, judged.verdicts, judged.patch, left_out)
        return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Look at the commits, and write the table."""
    options = _parse()
    commits = list(_look_at(options))
    numbers: dict[str, int] = {}
    table = _HEAD + "".join(commit.row(numbers) for commit in commits)
    table += "".join(f"\n{number}. {note}" for note, number in numbers.items()) + "\n" * bool(numbers)
    if options.out is None:
        sys.stdout.write(table)
    else:
        text = options.out.read_text(encoding="utf-8")
        options.out.write_text(text.partition("| commit |")[0] + table, encoding="utf-8")
    wrong = [f"{one.name}: {problem}" for one in commits for problem in (*one.wrong, *one.judged.wrong)]
    whole = sum(not (commit.notes or commit.judged.notes) for commit in commits)
    said = f"{len(commits)} commits: of {whole} everything is read; wrong: {len(wrong)}"
    print("\n".join((said, *wrong)), file=sys.stderr)
    sys.exit(1 if wrong else 0)


def _look_at(options: argparse.Namespace) -> Iterator[Commit]:
    since = f"--since={options.since}"
    listed = _git(options.repository, "log", "--first-parent", "--reverse", since, "--format=%h %cs", "main")
    all_commits = [line.split() for line in listed.decode().splitlines()]
    count, rows = options.commits, options.rows
    step = max((len(all_commits) - 1) / max(count - 1, 1), 1)
    chosen = sorted({round(index * step) for index in range(count) if round(index * step) < len(all_commits)})
    known = rows.read_text(encoding="utf-8").splitlines() if rows and rows.exists() else []
    found = {record["name"]: Judged(**record) for record in map(json.loads, known)}
    for name, date in (all_commits[index] for index in chosen):
        with tempfile.TemporaryDirectory(prefix="tp-validate-history-") as folder:
            tree, scratch = Path(folder, "tree"), Path(folder, "scratch")
            scratch.mkdir()
            _write_out(options.repository, name, tree)
            pythons = [python for first, python in options.python if first <= date]
            if name not in found and pythons:
                found[name] = Judged(name)
                judge(found[name], tree, pythons[-1], scratch)
                patch(found[name], tree, pythons[-1], scratch)
                if rows:
                    with rows.open("a", encoding="utf-8") as file:
                        print(json.dumps(asdict(found[name])), file=file)
            yield _taken_for(name, date, tree, found.get(name, Judged(name)))


def _write_out(repository: Path, name: str, tree: Path) -> None:
    """Write what is looked at of a commit."""
    parts = _git(repository, "ls-tree", "--name-only", name, "torchtitan", TESTS, "assets/version.txt")
    archive = _git(repository, "archive", "--format=tar", name, *parts.decode().split())
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(tree, filter="data")


def _taken_for(name: str, date: str, tree: Path, judged: Judged) -> Commit:
    identity, line = torchtitan_identity(tree), nearest_line(tree)
    assert line is not None, "a commit of torchtitan has its package"
    points = [point for target in TARGETS.values() for point in target.entry_points(tree)]
    # What is like a release and older is what became the release.
    too_new = identity.mark is not None and identity.mark.since > date[:7]
    problems = [f"{point}: {point.problem}" for point in points if point.problem is not None]
    return Commit(
        name,
        date,
        str(identity).removeprefix("of unknown version, with the files of "),
        line.__name__.rpartition(".")[2],
        len(points) - len(problems),
        (*problems, *(f"{gone.unvalidated}: it {gone.what}" for gone in what_is_gone(tree))),
        ("it is told too new",) if too_new else (),
        judged,
    )


# --- verdicts and guards ---------------------------------------------------------------------------------


def judge(judged: Judged, tree: Path, python: str, scratch: Path, *more: str) -> None:
    """Compare the verdicts on a tree's flavors with what it does, and put its guards in and out."""
    out = scratch / "verdicts.jsonl"
    ended = _run([python, str(ROOT / "scripts/judge_tree.py"), str(out), *more], tree, str(ROOT))
    records = (
        [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    )
    flavors = [record for record in records if "flavor" in record]
    if not flavors:
        judged.verdicts = "not validated"
        judged.notes.append(f"verdicts: {_last_line(ended.stderr)}")
        return
    wrong = [f"{one['flavor']}: {one['wrong'][0]}" for one in flavors if one["wrong"]]
    unclear = [one for one in flavors if one["open"] and not one["wrong"]]
    right = len(flavors) - len(wrong) - len(unclear)
    counts = {"right": right, "not validated": len(unclear), "wrong": len(wrong)}
    judged.verdicts = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    judged.notes += dict.fromkeys(reason for one in unclear for reason in one["open"])
    judged.wrong += wrong
    guards = next((record["guards"] for record in records if "guards" in record), None)
    if guards is None or guards["left"] or guards["missed"]:
        judged.wrong.append(f"guards: {guards or _last_line(ended.stderr)}")
    else:
        judged.guards = ", in and out"


# --- the patch -------------------------------------------------------------------------------------------


def patch(judged: Judged, tree: Path, python: str, scratch: Path) -> None:
    """Make the patch of a tree, apply it, run the tests that it could break, and take it out again."""
    before, patches = _snapshot(tree), scratch / "patches"
    scripts = ROOT / "scripts"
    made = _run(
        [sys.executable, str(scripts / "make_patches.py"), "--source", str(tree), "--out", str(patches)]
    )
    if made.returncode:
        judged.patch = "refused"
        judged.notes.append(f"patch: {_last_line(made.stderr).replace(str(tree), 'the tree')}")
        return
    (file,) = patches.glob("*.patch")
    changed = re.findall(r"^diff --git a/(\S+) ", file.read_text(encoding="utf-8"), re.M)
    apply = [python, str(scripts / "apply_patches.py"), str(tree), "--patches", str(patches)]
    applied = _run(apply, tree, str(ROOT))
    # 3: applied, and something that changed could not be called here.
    broken = [] if applied.returncode in (0, 3) else [_last_line(applied.stderr)]
    if not broken:
        tests = list(_tests_of(tree, changed))
        failed, passed = _failures(tree, python, scratch, tests)
        judged.patch = f"applies, {passed} tests pass"
        out = _run([*apply, "--reverse"], tree, str(ROOT))
        if out.returncode or _snapshot(tree) != before:
            broken.append(f"it does not come out as it went in: {_last_line(out.stderr)}")
        # Its own tests are gone with it, and have no excuse.
        theirs = [
            test for test in tests if test not in changed and any(_is_in(case, test) for case in failed)
        ]
        again, _ = _failures(tree, python, scratch, theirs)
        broken += [f"{case} fails with it: {why}" for case, why in failed.items() if case not in again]
    if broken:
        judged.patch = "broken"
        judged.wrong += [f"patch: {problem}" for problem in broken]


def _tests_of(tree: Path, changed: list[str]) -> Iterator[str]:
    """The patch's own tests, and those of the tree that name a module that it changes."""
    modules = [
        name.removesuffix(".py").replace("/", ".") for name in changed if name.startswith("torchtitan/")
    ]
    for file in sorted((tree / TESTS).rglob("test_*.py")):
        name, text = file.relative_to(tree).as_posix(), file.read_text(encoding="utf-8")
        if name in changed or any(module in text for module in (*modules, "update_from_config")):
            yield name


def _failures(tree: Path, python: str, scratch: Path, tests: list[str]) -> tuple[dict[str, str], int]:
    """Which cases of some files of tests fail, and why; and how many pass."""
    if not tests:
        return {}, 0
    report = scratch / "tests.xml"
    report.unlink(missing_ok=True)
    how = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={report}")
    ended = _run([python, "-m", "pytest", *how, *tests], tree)
    if not report.exists():
        return {test: _last_line(ended.stdout + ended.stderr) for test in tests}, 0
    failed, passed = {}, 0
    for case in ElementTree.parse(report).iter("testcase"):
        problems = [problem for kind in ("failure", "error") for problem in case.findall(kind)]
        name = f"{case.attrib['classname']}.{case.attrib['name']}".lstrip(".")
        # A test that wants another package tells nothing of the patch.
        if problems and not re.search(r"No module named '(?!torchtitan)", problems[0].text or ""):
            failed[name] = problems[0].attrib.get("message", "")[:200]
        passed += not problems and case.find("skipped") is None
    return failed, passed


def _is_in(case: str, test: str) -> bool:
    return f"{case}.".startswith(f"{test.removesuffix('.py').replace('/', '.')}.") or case == test


def _snapshot(tree: Path) -> dict[str, str]:
    """The hash of every file that is not Python's own, by path."""
    return {
        path.relative_to(tree).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in tree.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


# --- processes -------------------------------------------------------------------------------------------


def _run(command: list[str], *python_path: Path | str) -> subprocess.CompletedProcess[str]:
    """Run something, with folders first on its path; one that takes too long has failed."""
    path = os.pathsep.join([*map(str, python_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    env: Mapping[str, str] = {**os.environ, **settings}
    where = python_path[0] if python_path else None
    try:
        return subprocess.run(
            command, env=env, cwd=where, capture_output=True, text=True, timeout=_PATIENCE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no end after {_PATIENCE_SECONDS} s")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing was said")


def _git(repository: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(repository), *arguments], check=True, capture_output=True).stdout


def _since(text: str) -> tuple[str, str]:
    since, _, python = text.partition("=")
    return since, python


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", type=Path, required=True, help="a clone of pytorch/torchtitan")
    parser.add_argument("--commits", type=int, default=60, help="how many to look at")
    parser.add_argument("--since", default="2025-10-17", help="the date of the first")
    parser.add_argument(
        "--python", type=_since, action="append", default=[], metavar="DATE=PYTHON", help="judge, too"
    )
    parser.add_argument("--rows", type=Path, help="a file that keeps what was found")
    parser.add_argument("--out", type=Path, help="the page whose table is written again")
    return parser.parse_args()


if __name__ == "__main__":
    main()
