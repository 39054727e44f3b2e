"""Both distributions are built, valid, and work where nothing else is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from torchtitan_tp_validate import __version__

pytest.importorskip("build", reason="the session `core` has it")
pytest.importorskip("twine", reason="the session `core` has it")

NAME = f"torchtitan_tp_validate-{__version__}"


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return folder


def test_the_distributions_are_valid(dist: Path) -> None:
    files = sorted(path.name for path in dist.iterdir())
    assert files == [f"{NAME}-py3-none-any.whl", f"{NAME}.tar.gz"]
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())


def test_the_distributions_bring_all_that_they_need(dist: Path) -> None:
    tracked = set(run("git", "ls-files").splitlines())
    with zipfile.ZipFile(dist / f"{NAME}-py3-none-any.whl") as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == {name for name in tracked if name.startswith("torchtitan_tp_validate/")}
    with tarfile.open(dist / f"{NAME}.tar.gz") as archive:
        packed = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    # What only the repository's own services read.
    left_out = {name for name in tracked if name.startswith((".github/", ".ci/", ".pre-commit"))}
    assert tracked - left_out <= packed


@pytest.mark.parametrize("kind", [".whl", ".tar.gz"])
def test_a_distribution_works_alone_and_leaves_nothing_behind(dist: Path, kind: str, tmp_path: Path) -> None:
    (package,) = (path for path in dist.iterdir() if path.name.endswith(kind))
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    programs = tmp_path / "venv" / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", package)
    example = ROOT / "docs" / "examples" / "Qwen3.5-35B-A3B"
    said = run(programs / "tp-validate", "check", "--hf-config", example, "--tp", "1,2", cwd=tmp_path)
    assert said.startswith(f"{example}: 1, 2 of the TP degrees 1, 2 fit")
    assert run(programs / "python", "-c", "import torchtitan_tp_validate.rules", cwd=tmp_path) == ""
    run(programs / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "torchtitan-tp-validate")
    assert not list((tmp_path / "venv").rglob("*tp?validate*"))
