"""What commits of torchtitan are taken for: the script on a small history, and its page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.core.fake_torchtitan import ROOT, make
from torchtitan_tp_validate.identity import MARKS

PAGE = ROOT / "docs" / "history.md"
_SCRIPT = ROOT / "scripts" / "history.py"


def rows(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if re.match(r"\| [0-9a-f]{7,} \|", line)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def commit(folder: Path, date: str) -> None:
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    env = {
        "GIT_COMMITTER_DATE": f"{date}T12:00:00",
        "GIT_AUTHOR_DATE": f"{date}T12:00:00",
        "PATH": "/usr/bin:/bin",
    }
    subprocess.run([*git, "add", "-A"], check=True, env=env)
    subprocess.run([*git, "commit", "-qm", date], check=True, env=env)


def history(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_SCRIPT), "--repository", str(folder), *more]
    return subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    )


def test_each_commit_is_told_by_its_files_and_one_told_too_new_is_wrong(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", "-b", "main", str(tmp_path)], check=True)
    fake = make(tmp_path, "0.2.2", {"llama3": "parallelize_llama"}, infra=False, released=False)
    commit(tmp_path, "2025-11-01")
    newest = MARKS[-1]
    fake.write(f"torchtitan/{newest.file}", newest.text.removesuffix(":") + ": int = 1\n")
    commit(tmp_path, f"{newest.since}-20")
    ended = history(tmp_path, "--commits", "2")
    first, last = rows(ended.stdout)
    assert ended.returncode == 0, ended.stderr
    assert (first[1], first[2]) == ("2025-11-01", "of unknown version")
    assert last[2] == f"main (newer than {newest.after}, like {newest.since})"
    assert last[4] == "1"
    assert last[5].startswith("every rule (has no config/manager.py); ")
    assert "2 commits: of 0 everything is read; told too new: 0" in ended.stderr

    fake.write("torchtitan/more.py", "")
    commit(tmp_path, "2025-12-01")
    ended = history(tmp_path, "--commits", "3")
    assert (ended.returncode, "told too new: 1" in ended.stderr) == (1, True)


def test_the_page_has_sixty_commits_and_none_is_told_too_new() -> None:
    table = rows(PAGE.read_text(encoding="utf-8"))
    assert len(table) >= 60
    assert [row[1] for row in table] == sorted(row[1] for row in table)
    for row in table:
        told = re.search(r"like (\d{4}-\d{2})\)", row[2])
        assert told is None or told[1] <= row[1][:7], row
    assert table[-1][5] == "-"
