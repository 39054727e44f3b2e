"""The pull requests for main: they go in and out, their tests and reproductions show the fault, then none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import apply_patches
import pytest

from tests.core.test_upstream import PATCHES, each_patch, each_report, is_test, told
from tests.docs.pages import assert_shows
from tests.patches.trees import commit_all, git, outcomes, run_tool, snapshot
from torchtitan_tp_validate.releases.torchtitan_0_3 import FAULT_SOURCES

of_main = pytest.mark.requires(torchtitan="main")
# They take turns: two ranks each, and main is imported by all of them.
in_turn = pytest.mark.xdist_group("upstream")


def unit_tests(patch: Path) -> list[str]:
    """The files of tests that a patch adds."""
    added = [c.path for c in apply_patches.read_changes(patch) if c.before == apply_patches.ABSENT]
    return [path for path in added if is_test(path)]


@pytest.fixture(scope="module")
def patched_main(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Main's sources with all of them; not to be changed."""
    folder = shutil.copytree(pristine, tmp_path_factory.mktemp("upstream") / "checkout")
    commit_all(folder)
    for patch in PATCHES:
        run_tool("git am", folder, patch)
    return folder


# --- in and out -----------------------------------------------------------------------------------------


@of_main
@each_patch
def test_each_goes_in_and_out_alone(checkout: Path, pristine: Path, patch: Path) -> None:
    commit_all(checkout)
    before = snapshot(pristine)
    changed = {change.path for change in apply_patches.read_changes(patch)}
    said = run_tool("git apply", checkout, patch)
    assert not re.search("fuzz|offset|reject", said), said
    after = snapshot(checkout)
    assert {path for path in after if before.get(path) != after[path]} == changed
    run_tool("git apply", checkout, patch, "--reverse")
    assert snapshot(checkout) == before
    run_tool("git am", checkout, patch)
    assert snapshot(checkout) == after
    assert f"\nSubject: [PATCH] {git(checkout, 'log', '-1', '--format=%s')}" in patch.read_text("ascii")


@of_main
def test_all_go_in_together_as_commits_and_out_again(
    patched_main: Path, pristine: Path, tmp_path: Path
) -> None:
    assert git(patched_main, "rev-list", "--count", "HEAD").strip() == str(len(PATCHES) + 1)
    checkout = shutil.copytree(patched_main, tmp_path / "checkout")
    # The first in are the first out: none needs another, in whatever order they come.
    for patch in PATCHES:
        run_tool("git apply", checkout, patch, "--reverse")
    assert snapshot(checkout) == snapshot(pristine)


# --- what they do ---------------------------------------------------------------------------------------


@of_main
@in_turn
def test_each_unit_test_fails_before_and_passes_after(
    checkout: Path, patched_main: Path, tmp_path: Path
) -> None:
    files = [file for patch in PATCHES for file in unit_tests(patch)]
    for file in files:
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(patched_main / file, checkout / file)
    before = outcomes(checkout, files, tmp_path / "before.xml")
    assert len(before) == len(PATCHES)
    assert all("failed" in seen for seen in before.values()), before
    after = outcomes(patched_main, files, tmp_path / "after.xml")
    assert all(seen == {"passed"} for seen in after.values()), after


def examples(page: Path, heading: str) -> Iterator[tuple[list[str], str]]:
    """The commands that run the reproduction under a heading of a text, and what it shows of each."""
    section = page.read_text("ascii").split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    for command, shown in re.findall(r"^```console\n\$ ([^\n]*)\n(.*?)```$", section, re.M | re.DOTALL):
        if command.endswith(f"{page.stem}.py"):
            yield command.split(), shown


def assert_runs_as_shown(page: Path, heading: str, tree: Path | None) -> None:
    """Run the reproduction of a text, from a tree or with what is installed, as often as it is shown."""
    ran = 0
    for (tool, *arguments, _), shown in examples(page, heading):
        launch = ["-m", "torch.distributed.run", "--standalone"] if tool == "torchrun" else []
        command = [sys.executable, *launch, *arguments, str(page.with_suffix(".py"))]
        python_path = [*filter(None, [str(tree or ""), os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(python_path), "OMP_NUM_THREADS": "1"}
        env["PYTHONDONTWRITEBYTECODE"] = "1"
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        # Errors after what was printed; each line of a rank's error has its rank in front.
        said = result.stdout + re.sub(r"^\[rank\d+\]: ", "", result.stderr, flags=re.MULTILINE)
        assert_shows(shown, said)
        ran += 1
    assert ran == 1


@of_main
@in_turn
@each_patch
def test_its_reproduction_shows_the_fault_before_and_not_after(
    pristine: Path, checkout: Path, patch: Path
) -> None:
    page = patch.with_suffix(".md")
    assert_runs_as_shown(page, "What goes wrong", pristine)
    run_tool("git apply", checkout, patch)
    assert_runs_as_shown(page, "Test plan", checkout)


@in_turn
@each_report
def test_the_reproduction_for_torch_shows_the_fault(page: Path) -> None:
    assert_runs_as_shown(page, "What goes wrong", None)


# --- what is told of them -------------------------------------------------------------------------------


def faults_in(tree: Path) -> set[str]:
    """The faults of torchtitan that are in a tree's source."""
    own = {code: source for code, source in FAULT_SOURCES.items() if source.package == "torchtitan"}
    return {code for code, source in own.items() if source.is_in(tree / "torchtitan")}


@of_main
def test_a_patched_main_is_accused_no_more_of_what_the_readme_says(
    pristine: Path, patched_main: Path, tmp_path: Path
) -> None:
    derived = {}
    for patch in PATCHES:
        tree = shutil.copytree(pristine, tmp_path / patch.name[:4])
        run_tool("git apply", tree, patch)
        derived[patch.name[:4]] = faults_in(pristine) - faults_in(tree)
    assert {number: codes for number, codes in derived.items() if codes} == told()
    # Main has kept the text of one, which needs full_dtensor. CKPT001 and CKPT006 it has mended since.
    assert faults_in(patched_main) == {"CKPT001", "CKPT005", "CKPT006"}
