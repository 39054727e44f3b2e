#!/usr/bin/env python
"""Say what torchtitan's own commits are taken for, and what of each would not be validated.

    scripts/history.py --repository CHECKOUT [--commits 60] [--since 2025-10-17] [--out docs/history.md]

The commits of main are spread evenly over their number. Of each it is looked up in its files, none of which
is imported, what it is told to be, which line reads it, what is read and is not there, and how many entry
points are guarded. The exit status is 1 where a commit is told to be newer than it is.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torchtitan_tp_validate.identity import torchtitan_identity
from torchtitan_tp_validate.releases import nearest_line, what_is_gone
from torchtitan_tp_validate.wrappers import TARGETS

_SHOWN = 2
"""How much of what is gone a row names."""
_HEAD = """\
| commit | of | told as | read as | entry points | not validated |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Commit:
    """A commit of main, and what it is taken for."""

    name: str
    date: str
    told: str
    line: str
    guarded: int
    problems: tuple[str, ...]
    gone: tuple[str, ...]
    is_told_too_new: bool

    @property
    def row(self) -> str:
        """The row of the table."""
        entry_points = f"{self.guarded}" + "".join(f"; {problem}" for problem in self.problems)
        more = [f"and {len(self.gone) - _SHOWN} more"] if len(self.gone) > _SHOWN else []
        left_out = "; ".join((*self.gone[:_SHOWN], *more)) or "-"
        return f"| {self.name} | {self.date} | {self.told} | {self.line} | {entry_points} | {left_out} |\n"


def main() -> None:
    """Look at the commits, and write the table."""
    options = _parse()
    commits = list(_look_at(options.repository, options.since, options.commits))
    table = _HEAD + "".join(commit.row for commit in commits)
    if options.out is None:
        sys.stdout.write(table)
    else:
        text = options.out.read_text(encoding="utf-8")
        options.out.write_text(text.partition(_HEAD)[0] + table, encoding="utf-8")
    wrong = [commit for commit in commits if commit.is_told_too_new]
    whole = sum(not commit.gone for commit in commits)
    print(
        f"{len(commits)} commits: of {whole} everything is read; told too new: {len(wrong)}", file=sys.stderr
    )
    sys.exit(1 if wrong else 0)


def _look_at(repository: Path, since: str, count: int) -> Iterator[Commit]:
    listed = _git(
        repository, "log", "--first-parent", "--reverse", f"--since={since}", "--format=%h %cs", "main"
    )
    all_commits = [line.split() for line in listed.decode().splitlines()]
    step = max((len(all_commits) - 1) / max(count - 1, 1), 1)
    chosen = sorted({round(index * step) for index in range(count) if round(index * step) < len(all_commits)})
    for name, date in (all_commits[index] for index in chosen):
        with tempfile.TemporaryDirectory(prefix="tp-validate-history-") as folder:
            archive = _git(repository, "archive", "--format=tar", name, "torchtitan")
            with tarfile.open(fileobj=io.BytesIO(archive)) as files:
                files.extractall(folder, filter="data")
            yield _taken_for(name, date, Path(folder))


def _taken_for(name: str, date: str, tree: Path) -> Commit:
    identity, line = torchtitan_identity(tree), nearest_line(tree)
    assert line is not None, "a commit of torchtitan has its package"
    points = [point for target in TARGETS.values() for point in target.entry_points(tree)]
    # What is like a release and older is what became the release.
    too_new = identity.mark is not None and identity.mark.since > date[:7]
    return Commit(
        name,
        date,
        str(identity).removeprefix("of unknown version, with the files of "),
        line.__name__.rpartition(".")[2],
        sum(point.problem is None for point in points),
        tuple(f"{point}: {point.problem}" for point in points if point.problem is not None),
        tuple(f"{gone.unvalidated} ({gone.what})" for gone in what_is_gone(tree)),
        too_new,
    )


def _git(repository: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(repository), *arguments], check=True, capture_output=True).stdout


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", type=Path, required=True, help="a clone of pytorch/torchtitan")
    parser.add_argument("--commits", type=int, default=60, help="how many to look at")
    parser.add_argument("--since", default="2025-10-17", help="the date of the first")
    parser.add_argument("--out", type=Path, help="the page whose table is written again")
    return parser.parse_args()


if __name__ == "__main__":
    main()
