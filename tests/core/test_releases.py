"""A tested release is told by what its files are: main and forks keep the last release's number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.core.fake_torchtitan import ROOT, FakeTorchtitan, make
from torchtitan_tp_validate import identity as identities
from torchtitan_tp_validate.identity import MARKS, Identity, Mark
from torchtitan_tp_validate.release_files import BLOBS

LLAMA3 = "torchtitan/models/llama3/parallelize.py"
QWEN3 = "torchtitan/models/qwen3/parallelize.py"
_SOURCES = {LLAMA3: b"def parallelize_llama(): ...\n", QWEN3: b"def parallelize_qwen3(): ...\n"}


def test_the_table_is_made_of_the_committed_patches() -> None:
    code = "import make_releases as m; assert m.table() == m.TABLE.read_text(encoding='utf-8')"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert list(BLOBS) == ["0.2.0", "0.2.1", "0.2.2", "0.3.0"]


# --- what a tree of files is ----------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree that is release 7.1, whose patch adds a line to each of two files, and calls itself so."""
    from tests.core.fake_torchtitan import blob

    for path, text in _SOURCES.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(text)
    table = {path: (blob(text), blob(text + b"# checked\n")) for path, text in _SOURCES.items()}
    other = {LLAMA3: (blob(b"other\n"), blob(b"other # checked\n"))}
    monkeypatch.setattr(identities, "BLOBS", {"7.0": other, "7.1": table})
    monkeypatch.setattr(identities, "KNOWN_RELEASES", {"7.0", "7.1"})
    monkeypatch.setattr(identities, "package_folder", lambda package, source: tmp_path / package)
    call_itself("7.1", monkeypatch)
    return tmp_path


def call_itself(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "torchtitan_version", lambda: version)


def edit(tree: Path, *paths: str, text: str = "# checked\n") -> None:
    for path in paths:
        with (tree / path).open("a") as stream:
            stream.write(text)


def identity() -> Identity:
    return identities.torchtitan_identity()


def test_a_release_is_itself(tree: Path) -> None:
    assert identity() == Identity("7.1", "7.1")
    assert str(identity()) == "7.1"
    assert identity().problem is None


def test_a_release_with_our_patch_is_itself(tree: Path) -> None:
    edit(tree, LLAMA3, QWEN3)
    assert identity() == Identity("7.1", "7.1", patched=True)
    assert str(identity()) == "7.1 with the patch of torchtitan-tp-validate"
    assert identity().problem is None


def test_a_release_that_is_patched_in_part_has_changes(tree: Path) -> None:
    edit(tree, LLAMA3)
    assert identity() == Identity("7.1", like="7.1", changed=(LLAMA3, QWEN3))


def test_a_release_with_another_file_has_local_changes(tree: Path) -> None:
    edit(tree, QWEN3, text="# mine\n")
    assert identity() == Identity("7.1", like="7.1", changed=(QWEN3,))
    assert str(identity()) == identity().problem == f"7.1 with local changes: {QWEN3}"
    assert identity().name == "7.1"
    (tree / LLAMA3).unlink()
    assert identity().problem == f"7.1 with local changes: {LLAMA3}, {QWEN3}"


def test_of_many_changed_files_two_are_named() -> None:
    changed = Identity("7.1", like="7.1", changed=("a.py", "b.py", "c.py", "d.py"))
    assert changed.problem == "7.1 with local changes: a.py, b.py and 2 more"


def test_main_is_told_by_the_newest_of_its_marks(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = (Mark("2030-01", "7.0", "a.py", "old"), Mark("2030-02", "7.1", "a.py", "new"))
    monkeypatch.setattr(identities, "MARKS", marks)
    edit(tree, QWEN3, text="# of main\n")
    edit(tree, "torchtitan/a.py", text="old\n")
    # What 7.1 has too says nothing of a tree that is mostly 7.1.
    assert identity().problem == f"7.1 with local changes: {QWEN3}"
    edit(tree, "torchtitan/a.py", text="new\n")
    assert identity() == Identity("7.1", mark=marks[1])
    assert str(identity()) == identity().problem == "main (newer than 7.1, like 2030-02)"
    assert identity().name == "main"


def test_a_tree_like_no_release_is_main_by_any_mark(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "MARKS", (Mark("2030-01", "7.0", "a.py", "old"),))
    call_itself("8.0", monkeypatch)
    edit(tree, QWEN3, LLAMA3, text="# of main\n")
    edit(tree, "torchtitan/a.py", text="old\n")
    assert identity().problem == "main (newer than 7.0, like 2030-01)"


def test_the_marks_are_in_the_order_of_time() -> None:
    assert [mark.since for mark in MARKS] == sorted(mark.since for mark in MARKS)
    assert {mark.after for mark in MARKS} <= set(BLOBS)


def test_a_release_under_another_number_is_told_by_its_files(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, said in (("7.2.dev0", "7.2.dev0"), (None, "of unknown version")):
        call_itself(version, monkeypatch)
        assert identity() == Identity(version, "7.1")
        assert str(identity()) == f"{said}, with the files of 7.1"
        assert identity().problem is None


def test_an_unknown_number_with_unknown_files_is_no_release(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(tree, QWEN3, LLAMA3, text="# mine\n")
    for version, said in (("8.0", "8.0"), (None, "of unknown version")):
        call_itself(version, monkeypatch)
        assert identity() == Identity(version)
        assert str(identity()) == said
        assert identity().problem == (f"{said} is not a release that the guards were tested with (7.0, 7.1)")


def test_a_file_that_no_guard_lies_in_may_be_anybodys(tree: Path) -> None:
    edit(tree, "torchtitan/models/llama3/__init__.py", text="flavors = {}\n")
    assert identity().release == "7.1"


# --- what install and the doctor say ---------------------------------------------------------------------


def main_branch(folder: Path) -> FakeTorchtitan:
    """A torchtitan that calls itself 0.2.2, and is something else."""
    models = {"llama3": "parallelize_llama", "qwen3": "parallelize_qwen3"}
    return make(folder, "0.2.2", models, infra=False, released=False)


SAID = "torchtitan 0.2.2 with local changes: "


def test_main_under_a_releases_number_is_warned_of_guarded_and_refused_when_strict(tmp_path: Path) -> None:
    output = main_branch(tmp_path).expect("""
        import warnings
        import torchtitan_tp_validate as tpv
        try:
            tpv.install(strict=True)
        except tpv.InstallError as error:
            print(error)
        assert not tpv.installed()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            print(len(tpv.install().guarded))
        print(*(w.message for w in caught), sep="\\n")
        """)
    said = output.splitlines()
    count = len(said) // 2 - 1
    headline, strict, guarded, warnings = said[0], said[1 : count + 1], said[count + 1], said[count + 2 :]
    assert headline == "Cannot guard everything:"
    assert strict == [f"  {warning}" for warning in warnings]
    warning, *gone = warnings
    assert gone[0] == "torchtitan has no config/manager.py, which is read for every rule: not validated."
    assert warning.startswith(f"{SAID}torchtitan/distributed/tensor_parallel.py, ")
    assert warning.endswith(" more: 2 entry points were found in it and are guarded.")
    assert int(guarded) >= 2


def test_the_doctor_does_not_take_main_for_the_release(tmp_path: Path) -> None:
    fake = main_branch(tmp_path)
    result = fake.run("import sys; from torchtitan_tp_validate.cli import main; sys.exit(main(['doctor']))")
    assert [line for line in result.stdout.splitlines() if line.startswith(SAID)], result.stdout


def patched_release(folder: Path) -> Any:
    """A stand-in for release 0.3.0 with our patch: its files, and those before the patch."""
    fake = make(folder, "0.3.0", {"llama3": "parallelize_llama"}, infra=False, released=False)
    before = fake.blobs()
    path = folder / LLAMA3
    path.write_text(path.read_text() + "# checked\n")
    return fake, {file: (before[file], blob) for file, blob in fake.blobs().items()}


def test_our_own_patch_is_no_reason_to_refuse(tmp_path: Path) -> None:
    fake, table = patched_release(tmp_path)
    output = fake.expect(f"""
        import sys
        from torchtitan_tp_validate.release_files import BLOBS
        BLOBS["0.3.0"] = {table!r}
        import torchtitan_tp_validate as tpv
        tpv.install(strict=True)
        from torchtitan_tp_validate.cli import main
        main(["doctor"])
        """)
    assert "torchtitan 0.3.0 with the patch of torchtitan-tp-validate" in output.splitlines()
