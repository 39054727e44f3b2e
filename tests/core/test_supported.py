"""A torchtitan that is not supported, or that lacks what it imports, is named as such by everything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.core.fake_torchtitan import FakeTorchtitan, fake_0_1, fake_0_3
from torchtitan_tp_validate.locate import KNOWN_RELEASES

TEXT = (
    "torchtitan 0.1.0 is not supported: it keeps its models and its configuration elsewhere, so nothing was "
    "validated; supported are 0.2.0 to 0.3.0."
)
CLI = "import sys; from torchtitan_tp_validate.cli import main; sys.exit(main(sys.argv[1:]))"
LAUNCHER = "from torchtitan_tp_validate.train import main; main()"


@pytest.fixture
def old(tmp_path: Path) -> FakeTorchtitan:
    return fake_0_1(tmp_path)


def test_the_supported_releases_are_those_that_are_known() -> None:
    assert (min(KNOWN_RELEASES), max(KNOWN_RELEASES)) == ("0.2.0", "0.3.0")


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "--model", "llama3", "--flavor", "8B", "--tp", "4"),
        ("check", "--", "--job.config_file", "x.toml"),
        ("table",),
        ("table", "--model", "llama3"),
        ("audit",),
        ("audit", "x.toml"),
    ],
)
def test_torchtitan_0_1_is_not_supported_by_the_command_line(
    old: FakeTorchtitan, arguments: tuple[str, ...]
) -> None:
    ended = old.run(CLI, *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1] == f"tp-validate: {TEXT}"
    assert "Traceback" not in ended.stderr


def test_torchtitan_0_1_is_what_the_doctor_finds(old: FakeTorchtitan) -> None:
    ended = old.run(CLI, "doctor")
    assert (ended.returncode, TEXT in ended.stdout.splitlines()) == (2, True)
    assert "torchtitan 0.1.0\n" in ended.stdout
    assert "not guarded  llama3: parallelize_llama: torchtitan 0.1.0 is not supported\n" in ended.stdout
    document = json.loads(old.run(CLI, "doctor", "--output-format", "json").stdout)
    assert document["problem"] == TEXT
    assert not any(target["guarded"] for target in document["targets"] if target["model"] == "llama3")


def test_torchtitan_0_1_is_not_started_by_the_launcher(old: FakeTorchtitan) -> None:
    ended = old.run(LAUNCHER, "--job.config_file", "x.toml")
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"{TEXT}\n")


def test_torchtitan_0_1_is_not_guarded(old: FakeTorchtitan) -> None:
    ended = old.run(
        """
        import torchtitan.train, torchtitan_tp_validate as tpv
        from torchtitan.models.llama3 import parallelize_llama
        stock = parallelize_llama, torchtitan.train.Trainer.__init__
        tpv.install()
        from torchtitan.models.llama3 import parallelize_llama
        assert stock == (parallelize_llama, torchtitan.train.Trainer.__init__)
        assert not [state for state in tpv.installed().guarded if state.model != "transformers"]
        try:
            tpv.install(strict=True)
        except tpv.InstallError as error:
            print(error)
        """
    )
    assert (ended.returncode, TEXT in ended.stdout) == (0, True), ended.stderr
    assert f"InstallWarning: {TEXT}" in ended.stderr


def test_torchtitan_0_1_has_no_drop_ins(old: FakeTorchtitan) -> None:
    ended = old.run("from torchtitan_tp_validate.wrappers.llama3 import parallelize_llama")
    assert ended.stderr.splitlines()[-1] == f"ImportError: {TEXT}"


MISSING = {
    "tyro": "torchtitan is installed, but tyro, which it imports, is not: pip install tyro.",
    "fla": "torchtitan is installed, but fla, which it imports, is not: pip install flash-linear-attention.",
}


@pytest.mark.parametrize("module", MISSING)
def test_what_torchtitan_imports_and_is_missing_is_named(tmp_path: Path, module: str) -> None:
    fake = fake_0_3(tmp_path)
    hidden = f"import sys; sys.modules[{module!r}] = None; "
    fake.write("torchtitan/config.py", f"import {module}.inner\n")
    ended = fake.run(hidden + LAUNCHER, "--module", "llama3")
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"{MISSING[module]}\n")
    fake.write("torchtitan/models/__init__.py", f"import {module}.inner\n")
    ended = fake.run(hidden + CLI, "check", "--model", "llama3", "--flavor", "8B", "--tp", "2")
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"tp-validate: {MISSING[module]}\n")


def test_a_torchtitan_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    hidden = """
import importlib.util, sys
class Hidden:
    def find_spec(name, *_):
        if name == "torchtitan":
            raise ModuleNotFoundError("No module named 'torchtitan'", name=name)
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torchtitan" else real(name, *a)
sys.meta_path.insert(0, Hidden)
"""
    ended = FakeTorchtitan(tmp_path).run(hidden + CLI, "table")
    line = "tp-validate: torchtitan is not installed: pip install torchtitan.\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line)


def test_a_model_that_imports_what_is_missing_says_what_to_install(tmp_path: Path) -> None:
    fake = fake_0_3(tmp_path)
    fake.write("torchtitan/models/__init__.py", "_supported_models = frozenset({'qwen3_5'})\n")
    fake.write("torchtitan/experiments/__init__.py", "_supported_experiments = frozenset()\n")
    fake.write("torchtitan/models/qwen3_5/__init__.py", "import fla.ops\n")
    hidden = "import sys; sys.modules['fla'] = None; "
    ended = fake.run(hidden + CLI, "check", "--model", "qwen3_5", "--flavor", "4B", "--tp", "2")
    assert (ended.returncode, ended.stdout) == (2, ""), sys.version
    assert "torchtitan.models.qwen3_5 cannot be imported: " in ended.stderr
    assert ended.stderr.endswith(" (pip install flash-linear-attention)\n")
