"""What commits of torchtitan are taken for, and what came of judging them: a small history, and the page."""

from __future__ import annotations

import json
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
    assert last[4:7] == ["1", "-", "-"]
    assert (first[7][:9], last[7][:3]) == ("1, 2, 3, ", "1, ")
    assert "\n1. every rule: it has no config/manager.py\n2. " in ended.stdout
    assert "2 commits: of 0 everything is read; wrong: 0" in ended.stderr

    fake.write("torchtitan/more.py", "")
    commit(tmp_path, "2025-12-01")
    ended = history(tmp_path, "--commits", "3")
    assert (ended.returncode, "wrong: 1" in ended.stderr) == (1, True)
    assert ended.stderr.endswith(": it is told too new\n")


def test_what_is_kept_of_a_commit_is_not_looked_at_again(tmp_path: Path) -> None:
    repository, kept = tmp_path / "repository", tmp_path / "rows.jsonl"
    subprocess.run(["git", "init", "-q", "-b", "main", str(repository)], check=True)
    make(repository, "0.2.2", {"llama3": "parallelize_llama"}, infra=False, released=False)
    commit(repository, "2025-11-01")
    look = ("--commits", "1", "--python", f"2025-01-01={sys.executable}", "--rows", str(kept))
    # Without torch there is no verdict; the checkout has no version that a patch could be for.
    (row,) = rows(history(repository, *look).stdout)
    assert row[5:7] == ["not validated", "refused"]
    record = json.loads(kept.read_text(encoding="utf-8"))
    kept.write_text(json.dumps({**record, "verdicts": "1 wrong", "wrong": ["planted"]}), encoding="utf-8")
    ended = history(repository, *look)
    assert (rows(ended.stdout)[0][5], ended.returncode) == ("1 wrong", 1)
    assert ended.stderr.endswith("wrong: 1\n" + record["name"] + ": planted\n")


def test_the_page_has_sixty_commits_and_none_is_told_too_new() -> None:
    table = rows(PAGE.read_text(encoding="utf-8"))
    assert len(table) >= 60
    assert [row[1] for row in table] == sorted(row[1] for row in table)
    for row in table:
        told = re.search(r"like (\d{4}-\d{2})\)", row[2])
        assert told is None or told[1] <= row[1][:7], row
    # Of the newest everything is read; a package that is not installed is none of it.
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", PAGE.read_text(encoding="utf-8"), re.M))
    assert all("No module named" in reasons[number] for number in table[-1][7].split(", "))


def test_the_page_has_no_wrong_verdict_and_no_broken_patch() -> None:
    table = rows(PAGE.read_text(encoding="utf-8"))
    for row in table:
        assert re.fullmatch(r"\d+ right(, \d+ not validated)?", row[5]), row
        assert re.fullmatch(r"refused|applies, [1-9]\d* tests pass", row[6]), row
        assert row[4].endswith(", in and out"), row


def test_the_page_says_each_reason_once() -> None:
    text = PAGE.read_text(encoding="utf-8")
    reasons = re.findall(r"^(\d+)\. (.*)$", text, re.M)
    named = {number for row in rows(text) for number in row[7].split(", ") if number != "-"}
    assert [number for number, _ in reasons] == [str(number) for number in range(1, len(named) + 1)]
    assert named == {number for number, _ in reasons}
    assert len({reason for _, reason in reasons}) == len(reasons)
