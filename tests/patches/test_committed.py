"""The committed patches of the check are what make_patches.py makes of the pristine releases, and small."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.patches.trees import PATCH, RELEASE, ROOT, snapshot

PATCHES = sorted((ROOT / "patches").glob("torchtitan-*/0001-*.patch"))


def test_the_committed_patch_is_the_output_of_make_patches(pristine: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "make_patches.py"]
    result = subprocess.run(
        [*command, "--source", pristine, "--out", tmp_path], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert snapshot(tmp_path) == {PATCH.name: PATCH.read_bytes()}
    assert "torchtitan.models.llama3" in result.stdout


def test_the_pristine_sources_are_those_of_the_source_distribution(pristine: Path, tmp_path: Path) -> None:
    wanted = ("--no-deps", "--no-binary", "torchtitan", f"torchtitan=={RELEASE}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", *wanted, "--dest", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / f"torchtitan-{RELEASE}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    released = snapshot(tmp_path / f"torchtitan-{RELEASE}")
    ours = snapshot(pristine)
    assert len(ours) > 100
    assert ours == {path: released[path] for path in ours}
    python = {path for path in released if path.startswith("torchtitan/") and path.endswith(".py")}
    assert python <= ours.keys()


def test_there_is_one_for_each_release() -> None:
    releases = [path.parent.name.removeprefix("torchtitan-") for path in PATCHES]
    assert releases == ["0.2.0", "0.2.1", "0.2.2", "0.3.0"]


def sizes(patch: Path) -> tuple[int, int, int]:
    """Entry points, and lines added and removed outside the tests."""
    text = patch.read_text(encoding="utf-8")
    code = [file for file in text.split("\ndiff --git a/")[1:] if not file.startswith("tests/")]
    lines = [line for file in code for line in file.split("\n@@ ", 1)[1].splitlines()[1:]]
    added = [line for line in lines if line.startswith("+")]
    return (
        sum(line.startswith("+    validate_tp_compat(model.") for line in added),
        len(added),
        sum(line.startswith("-") for line in lines),
    )


def test_the_readme_gives_their_sizes() -> None:
    text = (ROOT / "patches" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`torchtitan-.*?`) \| (\d+) \| (\d+), (\d+) \|", text, flags=re.MULTILINE)
    told = {name: tuple(map(int, row[1:])) for row in rows for name in re.findall("`(.*?)`", row[0])}
    assert told == {patch.parent.name: sizes(patch) for patch in PATCHES}


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.parent.name)
def test_a_patch_is_small_ascii_and_signed_off(patch: Path) -> None:
    text = patch.read_bytes().decode("ascii")
    message, *files = re.split(r"^diff --git a/", text, flags=re.MULTILINE)
    assert "\nSubject: [PATCH] Check the TP degree against the head counts\n" in message
    assert "\nSigned-off-by: torchtitan-tp-validate <" in message
    code = [file for file in files if not file.startswith("tests/")]
    assert len(code) == len(files) - 1
    assert 0 < sizes(patch)[1] < 120
    assert all(len(line) <= 89 for file in code for line in file.splitlines() if line.startswith("+"))
    # One line around each change, no more.
    assert all(len(re.findall(r"^ ", hunk, flags=re.M)) <= 2 for hunk in text.split("\n@@ ")[1:] if hunk)


def test_the_patched_torchtitan_needs_nothing_of_ours() -> None:
    added = [line for line in PATCH.read_text().splitlines() if line.startswith("+")]
    assert not [line for line in added if "torchtitan_tp_validate" in line]
