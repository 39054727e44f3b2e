"""Stand-in torchtitan trees: the files and shapes of a release, without torch.

They let the install machinery be tried on what no real release shows (a missing entry point, another
signature, an unknown version, the fork) in milliseconds, each in a fresh interpreter.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from torchtitan_tp_validate.locate import KNOWN_RELEASES

ROOT = Path(__file__).parents[2]

_POSITIONAL = "model, parallel_dims, job_config"
_KEYWORD_ONLY = "model, *, parallel_dims, training"


@dataclass(frozen=True)
class FakeTorchtitan:
    """A torchtitan package in ``folder``, to be put in front of the path.

    Attributes:
        release: the tested release that its files, as they are when it runs, are taken for; None when they
            are to be told by what they are.
    """

    folder: Path
    release: str | None = None

    def write(self, relative: str, text: str) -> None:
        path = self.folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.relative_to(self.folder).parents[:-1]:
            (self.folder / parent / "__init__.py").touch()
        path.write_text(textwrap.dedent(text), encoding="utf-8")

    def run(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``code`` in a fresh interpreter that imports this torchtitan."""
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)])}
        return subprocess.run(
            [sys.executable, "-c", self._as_released() + textwrap.dedent(code), *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def blobs(self) -> dict[str, str]:
        """File -> its git blob, of every module."""
        return {
            file.relative_to(self.folder).as_posix(): blob(file.read_bytes())
            for file in sorted((self.folder / "torchtitan").rglob("*.py"))
        }

    def _as_released(self) -> str:
        """Code that has these files taken for those of the release."""
        if self.release is None:
            return ""
        table = {file: (known, known) for file, known in self.blobs().items()}
        return (
            "from torchtitan_tp_validate.release_files import BLOBS\n"
            f"BLOBS[{self.release!r}] = {table!r}\ndel BLOBS\n"
        )

    def expect(self, code: str) -> str:
        """`run`, and fail with its output unless it succeeds; its standard output."""
        result = self.run(code)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


def blob(data: bytes) -> str:
    """What git calls this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def make(
    folder: Path,
    version: str,
    models: dict[str, str],
    *,
    infra: bool,
    signature: str | None = None,
    released: bool = True,
) -> FakeTorchtitan:
    """A torchtitan with ``models`` (package -> function name).

    Args:
        infra: with the file layout of 0.2.x rather than that of 0.3.x.
        signature: parameters of the functions, else those of the layout's release.
        released: whether its files are taken for the release's, if there is one of that version.
    """
    fake = FakeTorchtitan(folder, version if released and version in KNOWN_RELEASES else None)
    fake.write(
        f"torchtitan-{version}.dist-info/METADATA",
        f"Metadata-Version: 2.1\nName: torchtitan\nVersion: {version}\n",
    )
    (folder / f"torchtitan-{version}.dist-info" / "__init__.py").unlink(missing_ok=True)
    fake.write(
        "torchtitan/protocols/model_spec.py",
        """
        from dataclasses import dataclass
        from typing import Any

        @dataclass
        class ModelSpec:
            name: str
            parallelize_fn: Any
        """,
    )
    for model, function in models.items():
        layout = "infra.parallelize" if infra else "parallelize"
        fake.write(
            f"torchtitan/models/{model}/{layout.replace('.', '/')}.py",
            f"""
            calls = []

            def {function}({signature or (_POSITIONAL if infra else _KEYWORD_ONLY)}):
                '''Parallelize {model}.'''
                calls.append(model)
                return model
            """,
        )
        fake.write(
            f"torchtitan/models/{model}/__init__.py",
            f"""
            from torchtitan.protocols.model_spec import ModelSpec
            from .{layout} import {function}

            def model_registry():
                return ModelSpec("{model}", {function})
            """,
        )
    return fake


def fake_0_1(folder: Path) -> FakeTorchtitan:
    """The files of the first release that do not fit the later ones; it imports nothing."""
    fake = make(folder, "0.1.0", {"llama3": "parallelize_llama"}, infra=True)
    fake.write("torchtitan/config_manager.py", "class JobConfig: ...\n")
    fake.write("torchtitan/experiments/__init__.py", "")
    fake.write("torchtitan/train.py", "class Trainer:\n    def __init__(self, job_config): ...\n")
    return fake


def fake_0_2(folder: Path) -> FakeTorchtitan:
    """Positional calls, files under infra/."""
    models = {"llama3": "parallelize_llama", "llama4": "parallelize_llama", "qwen3": "parallelize_qwen3"}
    return make(folder, "0.2.2", models, infra=True)


def fake_0_3(folder: Path) -> FakeTorchtitan:
    """Keyword-only calls, files beside the model."""
    models = {"llama3": "parallelize_llama", "qwen3_5": "parallelize_qwen3_5"}
    return make(folder, "0.3.0", models, infra=False)


def fake_fork(folder: Path) -> FakeTorchtitan:
    """The qwen3_5_moe generation of upstream pull request #2545, an unreleased checkout."""
    models = {
        "llama3": "parallelize_llama",
        "llama4": "parallelize_llama",
        "qwen3_5_moe": "parallelize_qwen3_5_moe",
    }
    return make(
        folder,
        "0.2.2+fork",
        models,
        infra=False,
        signature="model, *, parallel_dims, training, model_converters, parallelism",
    )
