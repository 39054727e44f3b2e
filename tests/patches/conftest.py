from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.patches.trees import PATCH, git, write_pristine


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed release's sources; not to be changed."""
    return write_pristine(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def checkout(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the pristine sources."""
    return shutil.copytree(pristine, tmp_path / "checkout")


@pytest.fixture(scope="session")
def patched(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources with the committed patch; not to be changed."""
    folder = shutil.copytree(pristine, tmp_path_factory.mktemp("patched") / "checkout")
    git(folder, "init", "--quiet", ".")
    git(folder, "apply", str(PATCH))
    return folder
