from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.patches.trees import write_pristine

import apply_patches  # isort: skip  # in scripts/, which trees puts on the path


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed release's sources; not to be changed."""
    return write_pristine(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def checkout(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the pristine sources."""
    return shutil.copytree(pristine, tmp_path / "checkout")


@pytest.fixture(scope="session")
def applied(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The sources after scripts/apply_patches.py, and what that had to tell; not to be changed."""
    folder = shutil.copytree(pristine, tmp_path_factory.mktemp("applied") / "checkout")
    return folder, apply_patches.run(folder, None, check=False, reverse=False)


@pytest.fixture(scope="session")
def patched(applied: tuple[Path, list[str]]) -> Path:
    """The patched sources."""
    return applied[0]
