"""patches/upstream: what can be said of the pull requests without torchtitan."""

from __future__ import annotations

import re
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "patches" / "upstream"
PATCHES = sorted(FOLDER.glob("*.patch"))
TEXTS = sorted(FOLDER.glob("*.md"))
REPORTS = sorted(FOLDER.glob("pytorch-*.md"))
HEADINGS = ["Summary", "What goes wrong", "Why this form", "Test plan"]

each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.name[:4])
each_report = pytest.mark.parametrize("page", REPORTS, ids=lambda path: path.stem)
each_text = pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.name[:4])


def subject(patch: Path) -> str:
    """The title of a patch's pull request."""
    return message_from_string(patch.read_text("ascii"))["Subject"].removeprefix("[PATCH] ")


def told() -> dict[str, set[str]]:
    """Number of a patch that mends a fault -> its code, as the readme has it."""
    readme = (ROOT / "patches" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\d{4})` \| (NUM\d{3}|-) \|", readme, flags=re.MULTILINE))
    assert list(rows) == [patch.name[:4] for patch in PATCHES]
    return {number: {code} for number, code in rows.items() if code != "-"}


def test_the_page_of_faults_names_those_that_mend_one() -> None:
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (NUM\d{3}) \|.*\| [^|]*?main: (\d{4}) \|$", page, flags=re.MULTILINE)
    assert {number: {code} for code, number in rows} == told()


def test_each_has_its_text_and_its_reproduction() -> None:
    assert [patch.name[:4] for patch in PATCHES] == [f"{n:04}" for n in range(1, len(PATCHES) + 1)]
    stems = [page.stem for page in (*PATCHES, *REPORTS)]
    assert [text.stem for text in TEXTS] == stems
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == stems
    assert {path.suffix for path in FOLDER.iterdir()} == {".patch", ".md", ".py"}


@each_text
def test_a_reproduction_is_short_and_needs_nothing_of_ours(page: Path) -> None:
    code = page.with_suffix(".py").read_text("ascii")
    assert len(code.splitlines()) <= (25 if page in REPORTS else 40)
    assert f" {page.stem}.py\n" in code


@each_text
def test_a_text_says_what_goes_wrong_by_a_real_run_and_what_was_tested(page: Path) -> None:
    parts = re.split(r"^## (.*)\n", page.read_text("ascii"), flags=re.MULTILINE)
    assert parts[1::2] == HEADINGS
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    runs = ["What goes wrong"] if page in REPORTS else ["What goes wrong", "Test plan"]
    for name in runs:
        assert re.search(rf"^\$ (python|torchrun .*\d) {page.stem}\.py\n.+", sections[name], re.MULTILINE)
    if page not in REPORTS:
        assert parts[0] == f"# {subject(page.with_suffix('.patch'))}\n\n"
        assert "\n$ pytest -q " in sections["Test plan"]


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_nothing_in_them_names_this_project(path: Path) -> None:
    assert not re.search(r"tp[-_]validate|NUM\d{3}|TP\d{3}", path.read_text("ascii"))


@each_patch
def test_a_patch_is_a_commit_that_git_am_takes_with_its_title(patch: Path) -> None:
    text = patch.read_text("ascii")
    assert text.startswith(f"From {'0' * 40} Mon Sep 17 00:00:00 2001\nFrom: Your Name <you@example.com>\n")
    message = message_from_string(text)
    assert message["Date"] == "Sat, 22 Aug 2026 12:00:00 +0000"
    assert re.fullmatch(r"\[PATCH\] [A-Z].{10,64}[^.]", message["Subject"])
    body = message.get_payload().split("\ndiff --git ", 1)[0]
    assert body.startswith("## Summary\n\n")
    assert all(len(line) <= 76 for line in body.splitlines())


def files_of(patch: Path) -> list[str]:
    """The part of a patch that changes each file."""
    return re.split(r"^diff --git a/", patch.read_text("ascii"), flags=re.MULTILINE)[1:]


def is_test(file: str) -> bool:
    """Whether a part of a patch changes a test."""
    return re.match(r"(\S+/)?tests/", file) is not None


@each_patch
def test_a_patch_has_one_line_around_each_change_and_one_new_file_of_tests(patch: Path) -> None:
    files = files_of(patch)
    assert ["\nnew file mode 100644\n" in file for file in files if is_test(file)] == [True]
    for file in files:
        for hunk in re.split(r"^@@ .*\n", file, flags=re.MULTILINE)[1:]:
            marks = "".join(line[:1] for line in hunk.splitlines())
            assert re.fullmatch(r" ?([+-]+ {1,2})*[+-]+ ?", marks), marks
    lines = [line for file in files for line in file.splitlines() if line.startswith("+")]
    assert all(len(line) <= 89 for line in lines)


def test_the_readme_gives_their_sizes() -> None:
    readme = (ROOT / "patches" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\d{4})` \|.*\| (\d+), (\d+) \|$", readme, flags=re.MULTILINE)
    sizes = {}
    for patch in PATCHES:
        code = [file.split("\n@@ ", 1)[1].splitlines()[1:] for file in files_of(patch) if not is_test(file)]
        first = [line[:1] for lines in code for line in lines]
        sizes[patch.name[:4]] = (first.count("+"), first.count("-"))
    assert {number: (int(added), int(removed)) for number, added, removed in rows} == sizes
