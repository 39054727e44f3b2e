"""The patches for transformers apply to the release that they name, and do there what they are for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from tests.transformers.models import EIGHT_OF_5_23

REPOSITORY = Path(__file__).parents[2]
PATCHES = sorted((REPOSITORY / "patches" / f"transformers-{transformers.__version__}").glob("*.patch"))

pytestmark = pytest.mark.skipif(not PATCHES, reason="there are no patches for this transformers release")


def test_they_apply_and_the_audit_then_names_none_of_their_classes(tmp_path: Path) -> None:
    installed = Path(transformers.__file__).parent
    shutil.copytree(installed, tmp_path / "transformers", ignore=shutil.ignore_patterns("__pycache__"))
    # The version is read from the metadata beside it.
    [metadata] = installed.parent.glob("transformers-*.dist-info")
    shutil.copytree(metadata, tmp_path / metadata.name)
    classes = set(EIGHT_OF_5_23)
    assert named(tmp_path, classes) == classes
    subprocess.run(["git", "apply", "-p2", *map(str, PATCHES)], cwd=tmp_path, check=True)
    assert named(tmp_path, classes) == set()


def named(folder: Path, classes: set[str]) -> set[str]:
    """Which of these classes the audit names with the transformers in this folder."""
    path = [str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    options = [option for name in sorted(classes) for option in ("--class", name)]
    result = subprocess.run(
        [sys.executable, "-m", "torchtitan_tp_validate", "hf-audit", "--output-format", "json", *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout, result.stderr
    content = json.loads(result.stdout)
    assert content["not_audited"] == [], result.stderr
    assert result.returncode == int(bool(content["head_left_whole"])), result.stderr
    return set(content["head_left_whole"])
