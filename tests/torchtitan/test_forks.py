"""A user's own model, in a fork of torchtitan or in a package beside it, guarded by its shape."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.forked import ROOT, Ended, in_forks, run_module, run_torchrun
from tests.torchtitan.installed import HAS_CONFIG_TREES

pytestmark = in_forks

OWN = Path(__file__).parent / "forks" / ("config_trees" if HAS_CONFIG_TREES else "model_args")
FUNCTION = "own.parallelize.parallelize_own" if HAS_CONFIG_TREES else "own.infra.parallelize.parallelize_own"
OTHERWISE = (
    """torchtitan looks at the first such layer only, and not before the process groups
  are up; any other one kills the first forward pass with
  "shape '[...]' is invalid for input of size ...".
"""
    if HAS_CONFIG_TREES
    else """the run starts, and its first forward pass dies in attention with
  "shape '[...]' is invalid for input of size ..." or "Cannot unflatten unevenly sharded tensor".
"""
)
HOW_TO_CHANGE = (
    "or in the config registry:\n  parallelism=ParallelismConfig(tensor_parallel_degree=8)"
    if HAS_CONFIG_TREES
    else "or in the job's TOML file:\n  [parallelism]\n  tensor_parallel_degree = 8"
)
REFUSED = f"""\
Tensor parallel degree (16) must divide n_kv_heads (8). For OwnModel{"" if HAS_CONFIG_TREES else "Args"}, \
max supported TP is 8.

  TP002 n_kv_heads = 8 is not a multiple of 16, in all 32 layers:
        wk and wv are split by columns, so that every rank computes whole key-value heads.

Without this check: {OTHERWISE}Degrees that work: 1, 2, 4, 8.
To change it: --parallelism.tensor_parallel_degree 8, {HOW_TO_CHANGE}
"""
SCRIPT = """\
import torchtitan_tp_validate
torchtitan_tp_validate.install()
import torchtitan.train
from torchtitan_tp_validate.job import parse_command_line
job = parse_command_line()
job.build() if hasattr(job, "build") else torchtitan.train.Trainer(job)
"""


class Fork:
    """A torchtitan with the model among its own (``fork``), or the model in a package ``beside`` it."""

    def __init__(self, folder: Path, where: str) -> None:
        self._folder, self._where = folder, where
        self.function = FUNCTION
        if where == "beside":
            shutil.copytree(OWN, folder / "own")
            return
        self.function = f"torchtitan.models.{FUNCTION}"
        spec = find_spec("torchtitan")
        assert spec
        assert spec.submodule_search_locations
        torchtitan = Path(spec.submodule_search_locations[0])
        for part in (*torchtitan.iterdir(), *(torchtitan / "models").iterdir()):
            link = folder / part.relative_to(torchtitan.parent)
            link.parent.mkdir(parents=True, exist_ok=True)
            if part.name != "models":
                link.symlink_to(part)
        registry = folder / "torchtitan/models/__init__.py"
        text = registry.read_text(encoding="utf-8")
        registry.unlink()
        registry.write_text(text.replace('"llama3",', '"llama3", "own",'), encoding="utf-8")
        shutil.copytree(OWN, folder / "torchtitan/models/own")

    def job(self, tp: int) -> list[str]:
        """Return the arguments of a job of the model."""
        degree = ["--parallelism.tensor_parallel_degree", str(tp)]
        if HAS_CONFIG_TREES:
            return ["--module", "own", "--config", "own_8b", *degree]
        brought = ["--experimental.custom_import", "own"] if self._where == "beside" else []
        return ["--model.name", "own", "--model.flavor", "8B", *brought, *degree]

    def _env(self) -> dict[str, str]:
        probe = ROOT / "tests" / "torchrun" / "probe"
        path = os.pathsep.join(map(str, (self._folder, probe, ROOT, os.environ.get("PYTHONPATH", ""))))
        return {"PYTHONPATH": path, "TP_VALIDATE_PROBE": str(self._folder)}

    def tp_validate(self, *arguments: str) -> Ended:
        """Run the command line with it."""
        return run_module("torchtitan_tp_validate", arguments, out=self._folder, env=self._env())

    def train(self, module: str, tp: int, nproc: int = 2) -> Ended:
        """Start a job of it, which ends where it would make its first process group."""
        how = {"nproc": nproc, "out": self._folder, "cwd": self._folder, "env": self._env()}
        return run_torchrun(module, self.job(tp), **how)

    @property
    def started(self) -> bool:
        """Whether a job has got as far as its process groups."""
        return any(self._folder.glob("process-group-*"))


@pytest.fixture(params=["fork", "beside"])
def fork(request: pytest.FixtureRequest, tmp_path: Path) -> Fork:
    return Fork(tmp_path, request.param)


def test_the_doctor_names_it(fork: Fork) -> None:
    arguments = ("doctor",) if fork.function.startswith("torchtitan.") else ("doctor", "--module", "own")
    ended = fork.tp_validate(*arguments)
    assert ended.returncode == 0, ended
    (line,) = [line for line in ended.output.splitlines() if "parallelize_own" in line]
    when = "guarded when its module is imported" if len(arguments) == 1 else "guarded when a job starts"
    assert line == f"guarded      own: {fork.function}: {when}, by its shape"


def test_a_degree_that_does_not_divide_its_heads_is_refused_by_the_launcher(fork: Fork) -> None:
    ended = fork.train("torchtitan_tp_validate.train", 16)
    assert ended.returncode != 0, ended
    assert REFUSED in ended.output, ended
    assert not fork.started, ended


def test_a_degree_that_divides_its_heads_is_let_through_by_the_launcher(fork: Fork) -> None:
    ended = fork.train("torchtitan_tp_validate.train", 2)
    assert fork.started, ended
    assert "not guarded" not in ended.output, ended


@pytest.mark.parametrize(("tp", "starts"), [(16, False), (2, True)])
def test_install_guards_it_where_a_trainer_starts(fork: Fork, tmp_path: Path, tp: int, starts: bool) -> None:
    (tmp_path / "users_script.py").write_text(SCRIPT)
    ended = fork.train("users_script", tp)
    assert fork.started is starts, ended
    assert ("must divide n_kv_heads (8). For OwnModel" in ended.output) is not starts, ended
