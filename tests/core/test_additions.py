"""What docs/architecture.md says that an addition touches is all that it takes: tried in a copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.core.fake_torchtitan import ROOT, make

PACKAGE = "torchtitan_tp_validate"


class Copy:
    """A copy of the repository, to be changed and asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (PACKAGE, "tests", "docs"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", *(page.name for page in ROOT.glob("*.md"))):
            shutil.copy(ROOT / name, folder)

    def add(self, file: str, text: str) -> None:
        (self.folder / file).write_text(textwrap.dedent(text), encoding="utf-8")

    def change(self, file: str, before: str, after: str) -> None:
        text = (self.folder / file).read_text(encoding="utf-8")
        assert text.count(before) == 1, (file, before)
        self.add(file, text.replace(before, after))

    def run(self, *arguments: str, beside: Path | None = None) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(map(str, filter(None, (self.folder, beside))))
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def expect(self, code: str, beside: Path | None = None) -> str:
        result = self.run("-c", textwrap.dedent(code), beside=beside)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def told_by(self, test: str) -> str:
        """What a test says that fails; nothing when it passes."""
        result = self.run("-m", "pytest", "-q", "-p", "no:cacheprovider", test)
        return "" if result.returncode == 0 else result.stdout + result.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path / "copy")


REFUSES = """
from types import SimpleNamespace as NS
import torchtitan_tp_validate as tpv

def refusal(call, *args, **more):
    try:
        call(*args, **more)
    except tpv.TPCompatError as error:
        return str(error)
"""


def test_every_file_of_a_line_is_in_the_list_of_readers() -> None:
    from torchtitan_tp_validate.releases import readers, releases

    listed = {str(reader.__name__).rpartition(".")[2] for reader in (*readers(), *releases())}
    files = {path.stem for path in (ROOT / PACKAGE / "releases").glob("torchtitan_*.py")}
    assert listed - {"huggingface"} == files


def test_a_line_of_torchtitan_is_a_file_and_its_name_in_the_list(copy: Copy) -> None:
    copy.add(
        f"{PACKAGE}/releases/torchtitan_9_9.py",
        '''
        """torchtitan 9.9: a model says how many heads it has in a word of its own."""

        from torchtitan_tp_validate.layout import Run
        from torchtitan_tp_validate.plan import Plan, PlanBuilder
        from torchtitan_tp_validate.releases.base import RequestedModel
        from torchtitan_tp_validate.rules import Line

        KV_REPLICATION = "torchtitan_tp_validate.kv_replication.torchtitan_9_9"
        TRAINER_MODULE = "torchtitan.run"
        SPMD_BACKENDS = ()
        CONTRACT = ()

        def find_config(model_or_config):
            return getattr(model_or_config, "head_total", None)

        def read(config, model, degrees):
            findings = PlanBuilder(Line.TORCHTITAN_0_2)
            findings.add("TP001", config, layers=(0,))
            return Plan("Nine", findings.dims(), 1, ("--tp {degree}",))

        def is_job(job):
            return hasattr(job, "nine")

        def requested_model(job):
            return RequestedModel("nine tiny", job.nine, job.function)

        def in_run(config, run):
            return config

        def read_run(job, model, degrees, broken):
            return Run(degrees, Line.TORCHTITAN_0_2)
        ''',
    )
    test = "tests/core/test_additions.py::test_every_file_of_a_line_is_in_the_list_of_readers"
    assert "torchtitan_9_9" in copy.told_by(test)
    listed, file = f"{PACKAGE}/releases/__init__.py", "torchtitan_9_9"
    copy.change(listed, "        torchtitan_fork,\n", f"        {file},\n        torchtitan_fork,\n")
    copy.change(listed, "torchtitan_fork, torchtitan_0_2\n", f"torchtitan_fork, {file}, torchtitan_0_2\n")
    copy.change(
        listed,
        "import torchtitan_0_2, torchtitan_0_3, torchtitan_main\n",
        f"import torchtitan_0_2, torchtitan_0_3, torchtitan_main, {file}\n",
    )
    copy.change(
        listed,
        "return torchtitan_0_3, torchtitan_main, torchtitan_0_2\n",
        f"return {file}, torchtitan_0_3, torchtitan_main, torchtitan_0_2\n",
    )
    assert copy.told_by(test) == ""
    out = copy.expect(
        REFUSES
        + """
from torchtitan_tp_validate.job import check_job
print(tpv.valid_tp_degrees(NS(head_total=6)))
job = NS(nine=NS(head_total=6), function=print, parallelism=NS(tensor_parallel_degree=4))
print(refusal(check_job, job, guarded=[print]))
"""
    )
    assert out.startswith("[1, 2, 3, 6]\nTensor parallel degree (4) must divide n_heads (6). For Nine, max")
    assert out.endswith("To change it: --tp 3\n")


def test_a_family_is_a_row_and_a_wrapper(copy: Copy, tmp_path: Path) -> None:
    row = 'Family("mine", "Mine", ("parallelize_mine",), ("torchtitan.models.mine",)),'
    copy.change(f"{PACKAGE}/models.py", "MODELS = (\n", f"MODELS = (\n    {row}\n")
    test = "tests/core/test_models.py::test_every_family_has_a_wrapper_of_its_own_and_every_wrapper_a_family"
    assert "'mine'" in copy.told_by(test)
    copy.add(
        f"{PACKAGE}/wrappers/mine.py",
        f'''
        """Drop-in `parallelize_mine`: Mine."""

        from {PACKAGE}.wrappers.guard import drop_in

        __getattr__ = drop_in(__name__)
        ''',
    )
    assert copy.told_by(test) == ""
    installed = make(
        tmp_path / "installed", "0.3.0", {"mine": "parallelize_mine"}, infra=False, released=False
    )
    out = copy.expect(
        REFUSES
        + """
import warnings; warnings.simplefilter("ignore")
from torchtitan_tp_validate.wrappers.mine import parallelize_mine
model = NS(model_args=NS(n_heads=8, n_kv_heads=2, n_layers=2))
assert parallelize_mine(model, parallel_dims=NS(tp=2), training=None) is model
print(refusal(parallelize_mine, model, parallel_dims=NS(tp=4), training=None))
tpv.install()
from torchtitan.models.mine.parallelize import parallelize_mine as stock
print(refusal(stock, model, parallel_dims=NS(tp=4), training=None))
""",
        beside=installed.folder,
    )
    assert out.count("Tensor parallel degree (4) must divide n_kv_heads (2).") == 2


def test_a_rule_is_an_entry_a_reader_that_finds_it_and_a_proof(copy: Copy) -> None:
    copy.change(
        f"{PACKAGE}/rules.py",
        '        Rule(\n            code="EP001",',
        """        Rule(
            code="TP099",
            dim="n_tails",
            why="every rank computes whole tails",
            otherwise={Line.TORCHTITAN_0_2: Otherwise("dies of it", "the run dies of it.")},
            instead="take a degree that divides it",
            example=Example(6, 3, 4),
            source="torchtitan, made up",
        ),
        Rule(
            code="EP001",""",
    )
    proofs = "tests/docs/test_architecture.py::test_every_rule_has_a_proof_and_every_proof_is_there"
    assert "TP099" in copy.told_by(proofs)
    copy.change(
        "docs/architecture.md", "\n| EP001 |", "\n| TP099 | `tests/core/test_additions.py` |\n| EP001 |"
    )
    assert copy.told_by(proofs) == ""
    copy.change(
        f"{PACKAGE}/releases/torchtitan_0_2.py",
        "    read_sequence(findings, degrees)\n    vocab",
        '    findings.add("TP099", args.n_tails, place="the tail")\n'
        "    read_sequence(findings, degrees)\n    vocab",
    )
    out = copy.expect(
        REFUSES
        + "print(refusal(tpv.validate_tp_compat, NS(n_heads=8, n_kv_heads=8, n_layers=1, n_tails=6), 4))"
    )
    assert out.startswith("Tensor parallel degree (4) must divide n_tails (6).")
    assert "TP099 n_tails = 6 is not a multiple of 4, in the tail:" in out
    assert "Without this check: the run dies of it." in out
    told = copy.run("-m", PACKAGE, "rule", "TP099").stdout
    assert told.startswith("TP099: n_tails\n")
    table = copy.run("-m", PACKAGE, "rules", "--output-format", "markdown").stdout
    assert "| TP099 | n_tails | dies of it |" in table
    pages = "tests/docs/test_pages.py::test_the_table_of_the_rules_is_what_the_command_prints"
    assert "TP099" in copy.told_by(pages)
    shown = copy.folder / "docs" / "rules.md"
    begin, between, end = re.split(
        r"(?<=markdown -->\n\n)(.*)(?=\n<!-- end)", shown.read_text("utf-8"), flags=re.S
    )
    assert "TP015" in between
    shown.write_text(begin + table + end, encoding="utf-8")
    assert copy.told_by(pages) == ""
