"""Trees of torchtitan sources to patch: the installed release as its authors ship it, and made ones.

The installed release is the pristine one: every file is compared with the hash that the wheel came with,
and `test_committed` compares them all with the source distribution.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from tests.forked import run_module

ROOT = Path(__file__).parents[2]
RELEASE = metadata.version("torchtitan")
COMMITTED = ROOT / "patches" / f"torchtitan-{RELEASE}"
# Main may have the number of no release: what is for releases is skipped there.
PATCH, *MENDS = sorted(COMMITTED.glob("*.patch")) or [COMMITTED / "0001-none.patch"]
"""The check, and the patches of faults, which are written by hand."""
GIT_AM = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", "am"]
_BY_A_FAULT = "AssertionError|'replicate_kv_heads'|'dict' object has no attribute 'to'"
"""What a unit test fails with: what is wrong, an option that is not there, or what a run dies of."""
TOOLS = {"git am": GIT_AM, "git apply": ["git", "apply", "--verbose"], "patch": ["patch", "-p1", "--input"]}

sys.path.insert(0, str(ROOT / "scripts"))


def write_pristine(folder: Path) -> Path:
    """The installed release as a checkout, each file as its hash says."""
    for file in metadata.files("torchtitan") or ():
        if file.parts[0].endswith(".dist-info") or file.hash is None:
            continue
        data = file.locate().read_bytes()  # type: ignore[attr-defined]  # a pathlib.Path
        digest = base64.urlsafe_b64encode(hashlib.new(file.hash.mode, data).digest()).rstrip(b"=").decode()
        assert digest == file.hash.value, f"{file} is not as torchtitan {RELEASE} ships it"
        write(folder / file, data)
    write(folder / "assets" / "version.txt", f"{RELEASE}\n".encode())
    return folder


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file that is not git's or Python's own, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not {".git", "__pycache__"} & set(path.parts)
    }


def git(folder: Path, *arguments: str) -> str:
    """Run git as somebody; its output."""
    somebody = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.com")
    command = ["git", *somebody, *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run_tool(tool: str, checkout: Path, patch: Path, *flags: str) -> str:
    """Run a tool on a patch; what it says."""
    command = [*TOOLS[tool], str(patch), *flags]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def commit_all(folder: Path) -> None:
    """Make a folder a clean git checkout."""
    git(folder, "init", "--quiet", ".")
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--message", "as it is")


def outcomes(checkout: Path, files: list[str], out: Path) -> dict[str, set[str]]:
    """Run files of unit tests in a checkout; file -> what became of its tests."""
    python_path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {"PYTHONPATH": python_path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    words = ["-q", "-p", "no:cacheprovider", f"--junitxml={out}", *files]
    ended = run_module("pytest", words, out=out.with_suffix(""), cwd=checkout, env=env)
    assert out.exists(), ended
    seen: dict[str, set[str]] = {file: set() for file in files}
    for case in ElementTree.parse(out).iter("testcase"):
        module = f"{case.attrib['classname']}."
        (file,) = [file for file in files if module.startswith(file.removesuffix("py").replace("/", "."))]
        failure = case.find("failure")
        text = "" if failure is None else f"{failure.attrib['message']}\n{failure.text}"
        assert case.find("error") is None, text
        # Not for a mistake of the test's own.
        assert failure is None or re.search(_BY_A_FAULT, text), text
        seen[file].add("passed" if failure is None else "failed")
    return seen


# --- made trees --------------------------------------------------------------------------------------

_MODELS = {
    "model_args": {
        "llama3": "parallelize_llama",
        "llama4": "parallelize_llama",
        "qwen3": "parallelize_qwen3",
    },
    "layer": {
        "llama3": "parallelize_llama",
        "llama4": "parallelize_llama",
        "qwen3_5_moe": "parallelize_qwen3_5_moe",
    },
    "layers": {"llama3": "parallelize_llama", "qwen3_5": "parallelize_qwen3_5"},
}
_SIGNATURES = {
    "model_args": "model, parallel_dims, job_config",
    "layer": "model, *, parallel_dims, training, model_converters, parallelism",
    "layers": "model, *, parallel_dims, training, parallelism",
}
_BASES = {
    "model_args": ("protocols/model.py", "class BaseModelArgs:\n    pass\n"),
    "layer": ("models/common/decoder.py", "class Decoder:\n    class Config:\n        layer: object\n"),
    "layers": ("models/common/decoder.py", "class Decoder:\n    class Config:\n        layers: list\n"),
}


def make(folder: Path, generation: str) -> Path:
    """A checkout with the files that the patch needs, in a generation's shape; it takes no torch."""
    put(folder, "assets/version.txt", "9.9.9\n")
    put(folder, "torchtitan/__init__.py", "")
    put(folder, "torchtitan/distributed/tensor_parallel.py", "import functools\n\n\nused = functools\n")
    file, text = _BASES[generation]
    put(folder, f"torchtitan/{file}", text)
    for model, function in _MODELS[generation].items():
        add_model(folder, generation, model, function)
    return folder


def add_model(folder: Path, generation: str, model: str, function: str) -> None:
    """One more model in a made tree."""
    layout = "infra/parallelize" if generation == "model_args" else "parallelize"
    put(
        folder,
        f"torchtitan/models/{model}/{layout}.py",
        f'''
        import os

        used = os


        def {function}({_SIGNATURES[generation]}):
            """Parallelize {model}."""
            # The mesh comes first.
            return parallel_dims.get_mesh("tp")
        ''',
    )
    put(folder, f"torchtitan/models/{model}/model.py", "def view(x, n_heads):\n    return x, n_heads\n")


def with_check(parameter: str, base: str = "") -> str:
    """A model that refuses head counts as its config meets the job's, which has had more names than one."""
    return f"""import os


class Llama3Model:
    class Config{base}:
        def update_from_config(self, *, {parameter}, **kwargs):
            tp = {parameter}.parallelism.tensor_parallel_degree
            if tp > 1 and self.layers[0].n_heads % tp:
                n_heads = self.layers[0].n_heads
                raise ValueError(f"tensor_parallel_degree ({{tp}}) must divide n_heads ({{n_heads}}).")
            self.used = os
"""


def put(folder: Path, relative: str, text: str) -> None:
    """Write a source file, and make packages of the folders above it."""
    write(folder / relative, textwrap.dedent(text).lstrip("\n").encode())
    for parent in Path(relative).parents:
        if parent.parts[:1] == ("torchtitan",) and not (folder / parent / "__init__.py").exists():
            write(folder / parent / "__init__.py", b"")
