"""The patches that mend faults: they go in and out alone and together, and do what their unit tests say."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from shutil import which

import apply_patches
import pytest
from apply_patches import CannotApplyError

from tests.forked import in_forks, run_module
from tests.patches.trees import (
    COMMITTED,
    MENDS,
    PATCH,
    RELEASE,
    ROOT,
    TOOLS,
    commit_all,
    git,
    outcomes,
    run_tool,
    snapshot,
)
from tests.torchtitan.optional import needs_qwen3_5
from torchtitan_tp_validate.locate import KNOWN_RELEASES
from torchtitan_tp_validate.releases.sources import Source
from torchtitan_tp_validate.rules import FAULTS

UNIT_TESTS = "tests/unit_tests"
README = (ROOT / "patches" / "README.md").read_text(encoding="utf-8")
one_by_one = pytest.mark.parametrize("patch", MENDS, ids=lambda path: path.name[:4])


def mend(checkout: Path, *numbers: str, check: bool = False, reverse: bool = False) -> list[str]:
    """Have the script apply mends; the numbers of those that it names."""
    report = apply_patches.mend(checkout, None, check=check, reverse=reverse, numbers=numbers)
    assert report.complete
    return [Path(line.split(".patch ")[0]).name[:4] for line in report.lines]


NUMBERS = [patch.name[:4] for patch in MENDS]


def test_the_mends_are_numbered_after_the_check() -> None:
    assert [f"{number:04}" for number in range(2, len(MENDS) + 2)] == NUMBERS
    assert MENDS


# --- in and out -----------------------------------------------------------------------------------------


@one_by_one
def test_each_goes_in_and_out_alone_by_every_tool(checkout: Path, pristine: Path, patch: Path) -> None:
    commit_all(checkout)
    changed = {change.path for change in apply_patches.read_changes(patch)}
    before, trees = snapshot(pristine), []
    for tool in TOOLS:
        if not which(TOOLS[tool][0]):
            continue
        said = run_tool(tool, checkout, patch)
        assert not re.search("fuzz|offset|reject", said), said
        trees.append(snapshot(checkout))
        assert {path for path in trees[-1] if before.get(path) != trees[-1][path]} == changed
        run_tool("git apply" if tool == "git am" else tool, checkout, patch, "--reverse")
        assert snapshot(checkout) == before
        git(
            checkout,
            "reset",
            "--quiet",
            "--hard",
            git(checkout, "rev-list", "--max-parents=0", "HEAD").strip(),
        )
    assert all(tree == trees[0] for tree in trees)


def test_all_go_in_together_in_any_order_and_out_again(checkout: Path, pristine: Path) -> None:
    git(checkout, "init", "--quiet", ".")
    trees = []
    for patches in ([PATCH, *MENDS], [*reversed(MENDS), PATCH]):
        for patch in patches:
            run_tool("git apply", checkout, patch)
        trees.append(snapshot(checkout))
        for patch in patches:
            run_tool("git apply", checkout, patch, "--reverse")
        assert snapshot(checkout) == snapshot(pristine)
    assert trees[0] == trees[1]


def test_all_go_in_as_commits_after_the_check(checkout: Path) -> None:
    commit_all(checkout)
    for patch in (PATCH, *MENDS):
        run_tool("git am", checkout, patch)
    assert git(checkout, "rev-list", "--count", "HEAD").strip() == str(len(MENDS) + 2)


def test_the_script_applies_and_reverses_them_before_and_after_the_check(
    checkout: Path, pristine: Path, patched: Path
) -> None:
    released, checked = snapshot(pristine), snapshot(patched)
    assert mend(checkout, "all", check=True) == NUMBERS
    assert snapshot(checkout) == released
    assert mend(checkout, NUMBERS[-1]) == NUMBERS[-1:]
    apply_patches.run(checkout, None, check=False, reverse=False)
    if NUMBERS[:-1]:
        assert mend(checkout, "all") == NUMBERS[:-1]
    everything = snapshot(checkout)
    assert mend(checkout, "all", reverse=True) == NUMBERS
    assert snapshot(checkout) == checked
    assert mend(checkout, *NUMBERS) == NUMBERS
    assert snapshot(checkout) == everything
    apply_patches.run(checkout, None, check=False, reverse=True)
    assert mend(checkout, "all", reverse=True, check=True) == NUMBERS
    assert mend(checkout, "all", reverse=True) == NUMBERS
    assert snapshot(checkout) == released


def test_the_command_line_asks_for_mends(checkout: Path, pristine: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "apply_patches.py", checkout, "--mend", *NUMBERS]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{patch.relative_to(ROOT)} is applied." for patch in MENDS]
    assert snapshot(checkout) != snapshot(pristine)


def refused(checkout: Path, *numbers: str, reverse: bool = False) -> str:
    """The text of a refusal, after which the tree must be as it was."""
    before = snapshot(checkout)
    with pytest.raises(CannotApplyError) as error:
        mend(checkout, *numbers, reverse=reverse)
    assert snapshot(checkout) == before
    return str(error.value)


def test_what_cannot_be_mended_is_refused(checkout: Path) -> None:
    folder = COMMITTED.relative_to(ROOT)
    shown = MENDS[0].relative_to(ROOT)
    for number in ("0001", "0099", "x"):
        assert refused(checkout, number) == (
            f"there is no mend {number} in {folder} (there are {', '.join(NUMBERS)})."
        )
    assert refused(checkout, NUMBERS[0], reverse=True) == f"{shown}: not applied."
    mend(checkout, NUMBERS[0])
    assert refused(checkout, *NUMBERS) == f"{shown}: applied already."
    mend(checkout, "all", reverse=True)
    path = next(
        change.path
        for change in apply_patches.read_changes(MENDS[0])
        if change.before != apply_patches.ABSENT
    )
    with (checkout / path).open("a") as stream:
        stream.write("# mine\n")
    assert refused(checkout, "all") == (
        f"{checkout} is not the tree that the patches in {folder} were made for. "
        f"These files differ: {path}. Undo the changes in them, or mend them by hand."
    )


def test_other_uncommitted_changes_are_refused(checkout: Path) -> None:
    commit_all(checkout)
    (checkout / "assets" / "version.txt").write_text(f"{RELEASE} \n")
    assert refused(checkout, "all") == (
        f"{checkout} has uncommitted changes: assets/version.txt. Commit or stash them first."
    )
    git(checkout, "checkout", "--quiet", ".")
    # Those of the other patches are none.
    for number in NUMBERS:
        mend(checkout, number)
    apply_patches.run(checkout, None, check=True, reverse=False)


# --- what they do ---------------------------------------------------------------------------------------


def unit_tests(patch: Path) -> list[str]:
    """The unit tests that a patch brings."""
    return [c.path for c in apply_patches.read_changes(patch) if c.path.startswith(f"{UNIT_TESTS}/")]


FILES = [file for patch in MENDS for file in unit_tests(patch)]


@pytest.fixture(scope="module")
def mended(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources with the check and all mends; not to be changed."""
    folder = shutil.copytree(pristine, tmp_path_factory.mktemp("mended") / "checkout")
    git(folder, "init", "--quiet", ".")
    run_tool("git apply", folder, PATCH)
    mend(folder, "all")
    return folder


@in_forks
def test_each_unit_test_fails_before_and_passes_after(checkout: Path, mended: Path, tmp_path: Path) -> None:
    for patch in MENDS:
        for file in unit_tests(patch):
            (checkout / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(mended / file, checkout / file)
    before = outcomes(checkout, FILES, tmp_path / "before.xml")
    after = outcomes(mended, FILES, tmp_path / "after.xml")
    assert len(after) == len(MENDS)
    for file, seen in after.items():
        assert "failed" in before[file], file
        assert seen == {"passed"}, file


# --- what is told of them -------------------------------------------------------------------------------


def sources() -> dict[str, Source]:
    """The faults in the source of the installed line's releases."""
    line = importlib.import_module(f"torchtitan_tp_validate.releases.torchtitan_{RELEASE[0]}_{RELEASE[2]}")
    faults: dict[str, Source] = line.FAULT_SOURCES
    return {code: source for code, source in faults.items() if source.package == "torchtitan"}


def faults_in(tree: Path) -> set[str]:
    """The faults that are in a tree's source, by the texts that this package goes by."""
    return {code for code, source in sources().items() if source.is_in(tree / "torchtitan")}


def rows(head: str) -> list[list[str]]:
    """The cells of the readme's table with this head."""
    table = README.split(f"\n{head}\n|", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def told() -> dict[str, dict[str, set[str]]]:
    """Release -> number of a mend -> the codes that the readme gives it."""
    found: dict[str, dict[str, set[str]]] = {}
    for codes, _, places in rows("| fault | what the patch does | patches |"):
        for release, number in re.findall(r"(0\.\d\.\d): `(\d{4})`", places):
            found.setdefault(release, {}).setdefault(number, set()).update(re.findall(r"[A-Z]+\d{3}", codes))
    return found


def not_patched(release: str) -> set[str]:
    """The codes of which the readme says that the release has no patch for them."""
    table = rows("| fault | releases | why there is no patch |")
    return {code for codes, releases, _ in table if release in releases for code in codes.split(", ")}


def test_the_readme_names_the_patches_that_there_are() -> None:
    there = {
        release: {path.name[:4] for path in (ROOT / "patches" / f"torchtitan-{release}").glob("*.patch")}
        for release in KNOWN_RELEASES
    }
    assert {release: {"0001", *numbers} for release, numbers in told().items()} == there


def test_a_mended_torchtitan_is_accused_of_what_the_readme_says(
    pristine: Path, tmp_path: Path, mended: Path
) -> None:
    before = faults_in(pristine)
    derived = {}
    for patch in MENDS:
        folder = shutil.copytree(pristine, tmp_path / patch.name[:4])
        mend(folder, patch.name[:4])
        derived[patch.name[:4]] = before - faults_in(folder)
    assert derived == told()[RELEASE]
    assert faults_in(mended) == not_patched(RELEASE) & before
    # What is repaired at run time is there as a patch as well, unless it is torch's, or none of the release.
    repaired = {code for code in before if FAULTS[code].can_be_repaired}
    assert repaired - not_patched(RELEASE) <= set().union(*derived.values())


def test_the_page_of_faults_names_the_patches() -> None:
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    by_code: dict[str, set[tuple[str, str]]] = {}
    for release, numbers in told().items():
        for number, codes in numbers.items():
            for code in codes:
                by_code.setdefault(code, set()).add((release, number))
    for code in FAULTS:
        (row,) = re.findall(rf"^\| {code} \|.*$", page, flags=re.MULTILINE)
        patches = row.rstrip("| ").rpartition("|")[2].strip()
        assert set(re.findall(r"(0\.\d\.\d): (\d{4})", patches)) == by_code.get(code, set()), code
        assert (patches == "no") is (code not in by_code), code


@pytest.mark.requires(torchtitan="0.3")
@needs_qwen3_5
@in_forks
def test_an_option_that_shares_heads_is_judged_with_it(mended: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(mended), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    fits = (
        "this run: TP 4 with EP 8 fits Qwen3.5-MoE by torchtitan's rule. Degrees that work: 1, 2, 4, 8, 16."
    )
    large, small, tp = "qwen35_122b_a10b", "qwen35_35b_a3b", "--parallelism.tensor_parallel_degree"
    for config, flags, said, status in (
        (large, [], fits, 0),
        (small, [tp, "4"], "\nDegrees that work: 1, 2.\n", 1),
        (large, [tp, "32"], "\nTensor parallel degree (32) must divide n_key", 1),
        # What can be set on the command line is frozen upstream.
        (large, ["--parallelism.replicate_kv_heads"], "Unrecognized options: --parallelism.rep", 2),
    ):
        job = ["--module", "qwen3_5", "--config", config, *flags]
        # So many ranks make a mesh, so that the check in the parallelize function is asked, too.
        words = ["check", "--world-size", "32", "--", *job]
        ended = run_module("torchtitan_tp_validate", words, out=tmp_path, cwd=tmp_path, env=env)
        assert said in ended.output + ended.errors, ended
        assert ended.returncode == status, ended


@one_by_one
def test_a_mend_is_small_ascii_signed_off_and_needs_nothing_of_ours(patch: Path) -> None:
    text = patch.read_bytes().decode("ascii")
    message, *files = re.split(r"^diff --git a/", text, flags=re.MULTILINE)
    assert re.search(r"\nSubject: \[PATCH\] [A-Z].{10,64}[^.]\n", message.replace("\n ", " "))
    assert "\nSigned-off-by: torchtitan-tp-validate <" in message
    assert "#" in message or "Not reported upstream" in " ".join(message.split())
    code = [file for file in files if not file.startswith("tests/")]
    assert len(unit_tests(patch)) == len(files) - len(code) == 1
    added = [line for file in code for line in file.splitlines() if re.match(r"\+(?!\+\+ b/)", line)]
    mends_a_fault = told()[RELEASE][patch.name[:4]]
    assert 0 < len(added) < (100 if mends_a_fault else 200)
    assert all(len(line) <= 89 for file in files for line in file.splitlines() if line.startswith("+"))
    assert "torchtitan_tp_validate" not in "".join(files)
    assert not re.search("NUM0|CKPT0", text)
    # One line around each change, no more; changes that lie close share a hunk.
    assert all(len(re.findall(r"^ ", hunk, flags=re.M)) <= 5 for hunk in text.split("\n@@ ")[1:])
