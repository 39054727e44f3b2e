"""The map, and the list of proofs, name what is there."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT
from torchtitan_tp_validate.rules import FAULTS, RULES, RUN_RULES

TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "torchtitan_tp_validate"


def test_the_map_shows_every_module_and_folder_of_the_package() -> None:
    (drawn,) = re.findall(r"```text\ntorchtitan_tp_validate/\n(.*?)```", TEXT, flags=re.DOTALL)
    shown = set(re.findall(r"^    (\w+(?:\.py|/))", drawn, flags=re.MULTILINE))
    shown |= set(re.findall(r"(?<= )(\w+\.py)(?= )", drawn))
    there = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    inside = {path.name for path in PACKAGE.rglob("*.py")}
    assert {name for name in shown if name.endswith("/")} == folders
    assert there <= shown <= there | folders | inside


def test_every_rule_has_a_proof_and_every_proof_is_there() -> None:
    rows = re.findall(r"^\| ([A-Z]+\d{3}[^|]*) \|([^|]*)\|", TEXT, flags=re.MULTILINE)
    codes = {code for row, _ in rows for code in re.findall(r"[A-Z]+\d{3}", row)}
    assert codes == {*RULES, *RUN_RULES, *FAULTS}
    proofs = re.findall(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", TEXT)
    assert len(proofs) > 20
    for file, test in proofs:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"{file}::{test}"
