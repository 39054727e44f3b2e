"""What is read of torchtitan is looked up in one that is no tested release, and what is gone is named."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from tests.core.fake_torchtitan import FakeTorchtitan, make
from torchtitan_tp_validate.releases import releases, torchtitan_main
from torchtitan_tp_validate.releases.contract import Gone, Reads, gone_from, missing_names
from torchtitan_tp_validate.rules import FAULTS, RULES, RUN_RULES

SOURCE = """
class Base:
    class Config:
        inherited: int

class Model(Base):
    other = 1
    class Config(Base.Config):
        field: int
    def method(self): ...

def make():
    class Made: ...

if True:
    class Perhaps: ...
"""


@pytest.mark.parametrize(
    "name",
    [
        *("Model", "Model.other", "Model.method", "Model.Config.field", "Model.Config.inherited"),
        *("Base.Config.inherited", "make", "Made", "Perhaps"),
    ],
)
def test_what_a_file_defines_is_found_by_its_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.py").write_text(SOURCE)
    assert gone_from((Reads("model.py", (name,)),), tmp_path) == ()


@pytest.mark.parametrize("name", ["Config", "Model.field", "Base.Config.field", "method", "Model.make"])
def test_what_it_does_not_define_is_gone(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.py").write_text(SOURCE)
    found = gone_from((Reads("model.py", ("Model", name), ("TP001",)),), tmp_path)
    assert found == (Gone("model.py", (name,), ("TP001",)),)


def test_what_is_gone_says_which_rules_are_not_validated() -> None:
    assert str(Gone("a.py", ("A.b", "A.c"), ("TP001", "TP002"))) == (
        "has no A.b and no A.c in a.py, which is read for TP001, TP002: not validated."
    )
    assert str(Gone("a.py", (), ())) == "has no a.py, which is read for every rule: not validated."


def test_a_file_that_is_gone_weighs_more_than_a_name() -> None:
    assert missing_names((Gone("a.py", (), ()),)) > missing_names((Gone("a.py", ("A", "B"), ()),)) == 2


@pytest.mark.parametrize("line", releases(), ids=lambda line: line.__name__.rpartition(".")[2])
def test_a_contract_names_rules_that_there_are_and_nothing_twice(line: object) -> None:
    contract: tuple[Reads, ...] = line.CONTRACT  # type: ignore[attr-defined]
    assert {code for reads in contract for code in reads.rules} <= {*RULES, *RUN_RULES, *FAULTS}
    read = [(reads.file, name, reads.rules) for reads in contract for name in reads.names]
    assert len(read) == len(set(read)) > 30


# --- what a run, install and the doctor say of a torchtitan without something ---------------------------


@pytest.fixture
def without_manager(tmp_path: Path) -> FakeTorchtitan:
    """A torchtitan with every file and name of the newest contract but one."""
    fake = make(tmp_path, "9.0", {"llama3": "parallelize_llama"}, infra=False)
    names: dict[str, list[str]] = {}
    for reads in torchtitan_main.CONTRACT:
        names.setdefault(reads.file, []).extend(reads.names)
    for file, all_names in names.items():
        text = "\n".join(_defined(name) for name in all_names if name != "CommConfig.mode")
        fake.write(f"torchtitan/{file}", text)
    return fake


def _defined(name: str) -> str:
    """Source with this name in it; classes are opened again, which a reader of files does not mind."""
    *classes, last = name.split(".")
    lines = [f"{'    ' * depth}class {each}:" for depth, each in enumerate(classes)]
    return "\n".join([*lines, f"{'    ' * len(classes)}{last} = None"])


GONE = "torchtitan has no CommConfig.mode in config/configs.py, which is read for MESH001: not validated."


def test_install_tells_what_is_gone_and_strict_refuses(without_manager: FakeTorchtitan) -> None:
    output = without_manager.expect("""
        import warnings
        import torchtitan_tp_validate as tpv
        try:
            tpv.install(strict=True)
        except tpv.InstallError as error:
            print(error)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tpv.install()
        print(*(w.message for w in caught), sep="\\n")
        """)
    assert [line.strip() for line in output.splitlines()].count(GONE) == 2


def test_the_doctor_names_it_in_words_and_as_data(without_manager: FakeTorchtitan) -> None:
    program = "import sys; from torchtitan_tp_validate.cli import main; sys.exit(main(sys.argv[1:]))"
    ended = without_manager.run(program, "doctor")
    assert (ended.returncode, GONE in ended.stdout.splitlines()) == (1, True), ended.stdout + ended.stderr
    document = json.loads(without_manager.run(program, "doctor", "--output-format", "json").stdout)
    assert document["gone"] == [
        {"file": "config/configs.py", "names": ["CommConfig.mode"], "rules": ["MESH001"]}
    ]


def test_a_plan_says_which_rules_were_not_judged_for_it(without_manager: FakeTorchtitan) -> None:
    code = """
        from types import SimpleNamespace as NS
        from torchtitan_tp_validate.releases import read_plan
        print(read_plan(NS(n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=8)).not_judged[-1])
        """
    output = without_manager.expect(textwrap.dedent(code))
    assert output == "MESH001: torchtitan has no CommConfig.mode in config/configs.py\n"
