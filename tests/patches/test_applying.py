"""The patches go in by every common tool, and apply_patches.py touches nothing that it does not know."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from shutil import which

import apply_patches
import make_patches
import pytest
from apply_patches import CannotApplyError

from tests.patches.trees import (
    PATCH,
    RELEASE,
    ROOT,
    commit_all,
    git,
    make,
    put,
    snapshot,
    with_check,
)

TOOLS = {
    "git am": ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", "am", str(PATCH)],
    "git apply": ["git", "apply", "--verbose", str(PATCH)],
    "patch": ["patch", "-p1", "--input", str(PATCH)],
}
SHOWN = PATCH.relative_to(ROOT)
CHANGED = {change.path for change in apply_patches.read_changes(PATCH)}


@pytest.mark.parametrize(
    "tool",
    [pytest.param(t, marks=pytest.mark.skipif(not which(TOOLS[t][0]), reason="no such tool")) for t in TOOLS],
)
def test_each_tool_makes_the_same_tree_without_fuzz_or_offset(
    checkout: Path, pristine: Path, patched: Path, tool: str
) -> None:
    commit_all(checkout)
    result = subprocess.run(TOOLS[tool], cwd=checkout, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not re.search("fuzz|offset|reject", result.stdout + result.stderr), result.stdout
    assert snapshot(checkout) == snapshot(patched)
    before, after = snapshot(pristine), snapshot(patched)
    assert {path for path in after if before.get(path) != after[path]} == CHANGED
    backwards = [*TOOLS["patch" if tool == "patch" else "git apply"], "-R"]
    subprocess.run(backwards, cwd=checkout, check=True, capture_output=True)
    assert snapshot(checkout) == snapshot(pristine)


def test_the_script_applies_and_calls_everything_that_it_changed(checkout: Path, patched: Path) -> None:
    report = apply_patches.run(checkout, None, check=False, reverse=False)
    first, second, *missing = report.lines
    assert first == f"{SHOWN} is applied: {len(CHANGED)} files of {checkout} are changed."
    assert snapshot(checkout) == snapshot(patched)
    entry_points = PATCH.read_text().count("+    validate_tp_compat(model.")
    checks = " and 2 config-time checks" if RELEASE == "0.3.0" else ""
    assert second == (
        f"the guard fires in {entry_points} entry points{checks}: "
        '"Tensor parallel degree (4) must divide n_kv_heads (2)."'
    )
    # vllm has no CPU build to test with.
    wanted = r"No module named 'vllm': called with stand-ins for what they import: \S+rl\.unified\S+"
    assert all(re.fullmatch(wanted, line) for line in missing)
    assert len(missing) <= 1
    assert report.complete


def test_the_script_applies_checks_and_reverses_to_the_byte(checkout: Path, pristine: Path) -> None:
    def script(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "scripts" / "apply_patches.py", checkout, *flags]
        return subprocess.run(command, capture_output=True, text=True)

    result = script("--check")
    assert result.returncode == 0, result.stderr
    assert (
        result.stdout == f"{SHOWN} can be applied: {len(CHANGED)} files of {checkout} are as it needs them.\n"
    )
    assert snapshot(checkout) == snapshot(pristine)

    result = script("--reverse")
    assert result.returncode == 1
    assert result.stderr == f"Nothing was changed: {SHOWN} is not applied.\n"

    subprocess.run(TOOLS["git apply"], cwd=checkout, check=True, capture_output=True)
    result = script()
    assert result.stderr == f"Nothing was changed: {SHOWN} is applied already.\n"
    result = script("--reverse")
    assert result.returncode == 0, result.stderr
    assert snapshot(checkout) == snapshot(pristine)


def refused(checkout: Path, patches: Path | None = None, *, reverse: bool = False) -> str:
    """The text of a refusal, after which the tree must be as it was."""
    before = snapshot(checkout)
    with pytest.raises(CannotApplyError) as error:
        apply_patches.run(checkout, patches, check=False, reverse=reverse)
    assert snapshot(checkout) == before
    return str(error.value)


def test_a_changed_file_is_refused_by_name(checkout: Path) -> None:
    changed = "torchtitan/distributed/tensor_parallel.py"
    with (checkout / changed).open("a") as file:
        file.write("# mine\n")
    assert refused(checkout) == (
        f"{checkout} is not the tree that {SHOWN} was made for. These files differ: {changed}. "
        "Undo the changes in them, or make a patch for the tree as it is: "
        f"scripts/make_patches.py --source {checkout} --out DIR, and name it by --patches DIR."
    )


def test_a_half_patched_tree_is_refused_both_ways(checkout: Path, patched: Path) -> None:
    half = sorted(CHANGED)[0]
    (checkout / half).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(patched / half, checkout / half)
    assert f"These files differ: {half}." in refused(checkout)
    assert "is not the tree that" in refused(checkout, reverse=True)


def test_an_unknown_version_is_refused(checkout: Path) -> None:
    (checkout / "assets" / "version.txt").write_text("0.1.7\n")
    assert refused(checkout) == (
        f"there is no patch for torchtitan 0.1.7 in patches/torchtitan-0.1.7 "
        "(there are some for 0.2.0, 0.2.1, 0.2.2, 0.3.0). "
        f"Make one: scripts/make_patches.py --source {checkout} --out DIR, and name it by --patches DIR."
    )


def test_another_releases_patch_is_refused(checkout: Path) -> None:
    other = "0.3.0" if RELEASE.startswith("0.2") else "0.2.2"
    assert "is not the tree that" in refused(checkout, ROOT / "patches" / f"torchtitan-{other}")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path) == (
        f"{tmp_path} is no torchtitan checkout: it has no torchtitan folder or no assets/version.txt."
    )


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """A made checkout that needs no torch, and the folder of its patch."""
    checkout, patches = make(tmp_path / "small", "layers"), tmp_path / "patches"
    make_patches.write(make_patches.patch(checkout), patches)
    return checkout, patches


def test_uncommitted_changes_are_refused_and_untracked_files_are_nobodys_business(
    small: tuple[Path, Path],
) -> None:
    checkout, patches = small
    commit_all(checkout)
    put(checkout, "notes.txt", "untracked\n")
    put(checkout, "assets/version.txt", "9.9.9+mine\n")
    assert refused(checkout, patches) == (
        f"{checkout} has uncommitted changes: assets/version.txt. Commit or stash them first."
    )
    git(checkout, "checkout", "--quiet", ".")
    before = snapshot(checkout)
    apply_patches.run(checkout, patches, check=False, reverse=False)
    assert snapshot(checkout) != before
    # The patch itself, uncommitted, is no such change.
    apply_patches.run(checkout, patches, check=False, reverse=True)
    assert snapshot(checkout) == before


def test_a_checkout_inside_another_repository_is_patched_all_the_same(small: tuple[Path, Path]) -> None:
    checkout, patches = small
    git(checkout.parent, "init", "--quiet", ".")
    before = snapshot(checkout)
    apply_patches.run(checkout, patches, check=False, reverse=False)
    assert "validate_tp_compat(" in (checkout / "torchtitan/models/llama3/parallelize.py").read_text()
    apply_patches.run(checkout, patches, check=False, reverse=True)
    assert snapshot(checkout) == before


LLAMA3 = "torchtitan.models.llama3.parallelize.parallelize_llama"
QWEN3_5 = "torchtitan.models.qwen3_5.parallelize.parallelize_qwen3_5"
FIRES = 'the guard fires in 2 entry points: "Tensor parallel degree (4) must divide n_kv_heads (2)."'


def prepend(checkout: Path, model: str, code: str) -> None:
    """Have a model's entry point do something at its import."""
    file = checkout / f"torchtitan/models/{model}/parallelize.py"
    file.write_text(file.read_text().replace("import os\n", f"import os\n\n{code}\n"))


def applied(checkout: Path, patches: Path) -> subprocess.CompletedProcess[str]:
    """What the script says of the patch of a made tree, after its first line."""
    make_patches.write(make_patches.patch(checkout), patches)
    before = snapshot(checkout)
    command = [sys.executable, ROOT / "scripts" / "apply_patches.py", checkout, "--patches", patches]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode in (0, 3), result.stderr
    assert result.stderr == ""
    assert snapshot(checkout) != before
    first, _, result.stdout = result.stdout.partition("\n")
    assert " is applied: " in first
    return result


def test_a_patch_whose_guard_does_not_fire_is_taken_out_again(small: tuple[Path, Path]) -> None:
    checkout, patches = small
    (patch,) = patches.glob("*.patch")
    patch.write_text(patch.read_text().replace("+    if tp == 1:\n", "+    if tp == 4:\n"))
    said = refused(checkout, patches)
    assert f"{LLAMA3} does not refuse TP 4: AttributeError" in said
    assert (
        "torchtitan.distributed.tensor_parallel.validate_tp_compat does not refuse TP 4: it returns" in said
    )


def test_a_patch_whose_guard_refuses_what_fits_is_taken_out_again(small: tuple[Path, Path]) -> None:
    checkout, patches = small
    (patch,) = patches.glob("*.patch")
    patch.write_text(patch.read_text().replace("if count % tp != 0]", "if count % 4 != 0]"))
    assert refused(checkout, patches).startswith(
        "torchtitan.distributed.tensor_parallel.validate_tp_compat does not refuse TP 4: TP 2, which fits: "
        "ValueError: Tensor parallel degree (2) must divide n_kv_heads (2)."
    )


@pytest.mark.parametrize("imports", ["", "import not_installed_here"])
def test_a_patch_that_breaks_a_config_time_check_is_taken_out_again(
    small: tuple[Path, Path], imports: str
) -> None:
    """Here with a name that is none of the function's, wherever its module is called."""
    checkout, _ = small
    put(
        checkout,
        "torchtitan/models/llama3/model.py",
        with_check("trainer_config").replace("import os", f"import os\n{imports}"),
    )
    patches = checkout.parent / "broken"
    patch = make_patches.write(make_patches.patch(checkout), patches)
    patch.write_text(patch.read_text().replace("(self, trainer_config.", "(self, config."))
    assert refused(checkout, patches) == (
        "torchtitan.models.llama3.model.Llama3Model.Config.update_from_config does not refuse TP 4: "
        "NameError: name 'config' is not defined"
    )


def test_what_wants_a_package_that_is_not_installed_is_called_with_stand_ins(
    small: tuple[Path, Path],
) -> None:
    checkout, patches = small
    prepend(
        checkout,
        "llama3",
        "print('hi', end='')\nfrom not_installed_here.ops import Op\n\n\nclass Mine(Op[int]): ...",
    )
    result = applied(checkout, patches)
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        FIRES,
        f"No module named 'not_installed_here': called with stand-ins for what they import: {LLAMA3}",
    ]


def test_the_helper_too_is_called_with_stand_ins(small: tuple[Path, Path]) -> None:
    checkout, patches = small
    put(
        checkout,
        "torchtitan/distributed/tensor_parallel.py",
        """
        import functools

        import not_installed_here as torch


        @torch.no_grad()
        def used(x: torch.Tensor = torch.zeros(3)): ...
        """,
    )
    result = applied(checkout, patches)
    assert result.returncode == 0
    fires, missing = result.stdout.splitlines()
    assert fires == FIRES
    assert missing.count(", ") == 5


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "raise TypeError('field \\'x\\' must be\\nkeyword-only')",
            "TypeError: field 'x' must be keyword-only",
        ),
        ("import sys; sys.exit('no GPU')", "SystemExit: no GPU"),
        ("from os import no_such_name", "ImportError: cannot import name 'no_such_name' from 'os'"),
        ("import torchtitan.gone", "No module named 'torchtitan.gone'"),
        ("os._exit(7)", "its import ends Python with status 7"),
    ],
)
def test_a_module_that_fails_to_import_is_named_and_the_others_are_judged(
    small: tuple[Path, Path], code: str, reason: str
) -> None:
    checkout, patches = small
    prepend(checkout, "llama3", code)
    result = applied(checkout, patches)
    assert result.returncode == apply_patches.INCOMPLETE == 3
    fires, failed = result.stdout.splitlines()
    assert fires == FIRES
    assert failed.startswith(f"not importable here: {LLAMA3}: {reason}")


def test_a_check_that_is_not_reached_is_no_success(small: tuple[Path, Path]) -> None:
    checkout, patches = small
    check = with_check("config").replace("tp =", "os.environ[config.name]\n            tp =", 1)
    put(checkout, "torchtitan/models/llama3/model.py", check)
    result = applied(checkout, patches)
    assert result.returncode == 3
    fires, failed = result.stdout.splitlines()
    assert fires == FIRES
    assert failed.startswith(
        "not run: torchtitan.models.llama3.model.Llama3Model.Config.update_from_config: TypeError: "
    )


def test_a_patch_that_a_module_no_longer_imports_with_is_taken_out_again(small: tuple[Path, Path]) -> None:
    checkout, _ = small
    put(
        checkout,
        "torchtitan/distributed/tensor_parallel.py",
        "import functools\n\nfrom torchtitan.models.llama3.parallelize import used\n",
    )
    patches = checkout.parent / "circular"
    make_patches.write(make_patches.patch(checkout), patches)
    said = refused(checkout, patches)
    modules = [f"torchtitan.{name}" for name in ("distributed.tensor_parallel", "models.llama3.parallelize")]
    assert said.startswith(f"with the patch, {', '.join(modules)}"), said
    assert "cannot be imported: ImportError: cannot import name 'validate_tp_compat' from partially" in said


def test_nothing_to_be_seen_is_no_success(small: tuple[Path, Path]) -> None:
    checkout, patches = small
    for model in ("llama3", "qwen3_5"):
        file = checkout / f"torchtitan/models/{model}/parallelize.py"
        file.write_text(file.read_text() + f"\n\ndel parallelize_{'llama' if model == 'llama3' else model}\n")
    make_patches.write(make_patches.patch(checkout), patches)
    assert refused(checkout, patches) == "\n  ".join(
        [
            f"{sys.executable} cannot show that the guard fires:",
            *(f"not run: {name}: its module, imported, does not hold it" for name in (LLAMA3, QWEN3_5)),
        ]
    )
