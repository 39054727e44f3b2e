"""Every command through the same formats, and a format in one function."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.core.cli.conftest import Program
from torchtitan_tp_validate.cli import torchtitan
from torchtitan_tp_validate.cli.commands import audit, hf_audit, table
from torchtitan_tp_validate.cli.formats import FORMATS
from torchtitan_tp_validate.cli.verdicts import Report
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.rehearsal import rehearse
from torchtitan_tp_validate.rehearsal.rehearse import Rehearsal
from torchtitan_tp_validate.rules import LINES
from torchtitan_tp_validate.search import Layout
from torchtitan_tp_validate.transformers_tp import audit as plans
from torchtitan_tp_validate.transformers_tp.audit import HeadAudit, Linear, NotAudited, PlanAudit

ROOT = Path(__file__).parents[3]
UNTOLD = "docs/cli.md names other formats than cli/formats.py has"
COMMANDS = ("check", "table", "audit", "hf-audit", "rule", "rules", "layouts", "rehearse", "doctor")
KILLED = {"rank": 1, "how": "killed", "stage": "starting", "error": "", "traceback": ""}
HEAD = HeadAudit("lm_head", (128, 64), None, (), None, 16384)
SEEN = Rehearsal("debug 8B", "dies", "fits", {"tp": 2}, (), (2,), math.nan, 0, ends=(KILLED,))
LAYOUT = Layout(Degrees(tp=2, dp_shard=4))
MADE_UP = SimpleNamespace(
    axes=["tp", "dp_shard"],
    considered=3,
    candidates=[LAYOUT],
    judged=1,
    excluded=Counter(TP002=2),
    confirmed=lambda: iter([LAYOUT]),
    arguments=lambda layout: ["--parallelism.tensor_parallel_degree", "2"],
)
PLANS = {
    "WholeForCausalLM": PlanAudit("WholeForCausalLM", "5.9", 4, HEAD, (Linear("fc", 2, (8, 4), 128),)),
    "HeadlessForCausalLM": PlanAudit("HeadlessForCausalLM", "5.9", 4, None, ()),
    "OddForCausalLM": NotAudited("OddForCausalLM", "it needs a | tokenizer"),
}


@pytest.fixture
def command_lines(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A command line for each command that has results; torchtitan and transformers are made up."""
    found = Report("debug 8B", group="debug", note="why not")
    monkeypatch.setattr(torchtitan, "installed", contextlib.nullcontext)
    monkeypatch.setattr(audit, "_jobs", lambda options: [audit._Job("debug 8B", lambda: found)])
    monkeypatch.setattr(table, "survey", lambda options: iter([found]))
    monkeypatch.setattr(rehearse, "rehearse", lambda *_, **__: SEEN)
    monkeypatch.setattr(torchtitan, "search_layouts", lambda *_, **__: (MADE_UP, "debug 8B"))
    monkeypatch.setattr(hf_audit, "transformers_version", lambda: "5.9")
    monkeypatch.setattr(plans, "audit_installed", lambda names: iter([PLANS[name] for name in names]))
    monkeypatch.setattr(plans, "audited_classes", lambda: list(PLANS))
    return {
        "check": ["check", "--hf-config", str(config_file), "--tp", "4"],
        "rule": ["rule", "TP002"],
        "rehearse": ["rehearse", "--model", "debug", "--flavor", "8B"],
        "layouts": ["layouts", "--world-size", "8", "--", "--config", "8b"],
        **{command: [command] for command in ("table", "audit", "hf-audit", "rules", "doctor")},
    }


BULLETS = """

@output_format("bullets between cells")
def bullets(findings: Findings[_T], thing: _T) -> Iterator[Line]:
    yield " \\N{BULLET} ".join(text for text, _ in findings.cells(thing)), ""
"""


def test_a_new_format_is_one_function(tmp_path: Path) -> None:
    """In a copy of the package and of these tests, which hold every command to every format."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "torchtitan_tp_validate", tmp_path / "torchtitan_tp_validate", ignore=ignored)
    shutil.copytree(ROOT / "tests" / "core" / "cli", tmp_path / "tests" / "core" / "cli", ignore=ignored)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "cli.md", tmp_path / "docs")
    with (tmp_path / "torchtitan_tp_validate" / "cli" / "formats.py").open("a") as file:
        file.write(BULLETS)
    command = [sys.executable, "-m", "pytest", "-q", "-rfp", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [*command, "-k", "test_every_command or formats_are_told", str(Path(__file__).relative_to(ROOT))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "400"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    passed = re.findall(r"^PASSED .*prints_every_format\[bullets-(\S+)\]", ended.stdout, re.MULTILINE)
    assert set(passed) == set(COMMANDS), ended.stdout
    # Whoever forgets the page is told which.
    failed = re.findall(r"^FAILED .*::(\S+) - AssertionError: (.*)", ended.stdout, re.MULTILINE)
    assert failed == [("test_the_formats_are_told_on_the_page", UNTOLD)]


def test_the_formats_are_told_on_the_page() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"\(`--output-format (.*?); every command", page, re.DOTALL)
    assert re.findall(r"(\w+)`", told) == list(FORMATS), UNTOLD


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_command_prints_every_format(
    tp_validate: Program, command_lines: dict[str, list[str]], tmp_path: Path, command: str, name: str
) -> None:
    words = command_lines[command]
    first, *rest = words
    status, out, err = tp_validate(first, "--output-format", name, *rest)
    if name == "github" and command in ("rule", "rules"):  # nothing of theirs stands in anybody's file
        assert (status, out) == (2, "")
        assert "there is no 'github'; choose from full, concise, json, markdown" in err
        return
    assert name in tp_validate(command, "--help").out
    assert status == tp_validate(*words).status
    assert out or name == "github"
    file = tmp_path / "result"
    assert tp_validate(first, "--output-format", name, "--output-file", file, *rest) == (status, "", "")
    assert file.read_text(encoding="utf-8") == out
    if name == "json":
        assert json.loads(out)["schema_version"] == 1
    elif name == "github":
        assert all(line.startswith(("::error ", "::notice ")) for line in out.splitlines())
    elif name == "markdown":
        head, rule, *rows = out.splitlines()
        assert rule == "|" + " --- |" * (head.count("|") - 1)
        assert rows


def test_an_audit_of_plans_in_every_format(tp_validate: Program, command_lines: dict[str, list[str]]) -> None:
    del command_lines
    whole = "WholeForCausalLM: every rank holds all of it: lm_head, no rule, 16,384 bytes per rank"
    odd = "OddForCausalLM: not audited: it needs a | tokenizer"
    assert tp_validate("hf-audit", "--output-format", "concise") == (
        1,
        f"{whole}\nHeadlessForCausalLM: names no output head\n{odd}\n",
        "",
    )
    assert tp_validate("hf-audit", "--output-format", "github").out == (
        f"::error title=tp-validate%3A WholeForCausalLM::{whole}\n"
        f"::notice title=tp-validate%3A OddForCausalLM::{odd}\n"
    )
    assert tp_validate("hf-audit", "--output-format", "markdown").out == (
        "| class | output head | rule | bytes per rank | what happens |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| WholeForCausalLM | lm_head | - | 16,384 | **every rank holds all of it** |\n"
        "| HeadlessForCausalLM | - | - | - | names no output head |\n"
        "| OddForCausalLM | - | - | - | `not audited: it needs a \\| tokenizer` |\n"
    )


def test_rules_as_a_table(tp_validate: Program) -> None:
    lines = tp_validate("rules", "--output-format", "markdown").out.splitlines()
    headings = ["code", "what it is about", *(line.value for line in LINES), "what to do"]
    headings.append("what must hold")
    assert lines[:2] == [f"| {' | '.join(headings)} |", "| --- " * len(headings) + "|"]
    assert any(
        "| TP005 | feed_forward_hidden_dim | dies in forward | **silently wrong** |" in line for line in lines
    )
    (row,) = tp_validate("rule", "TP002", "--output-format", "markdown").out.splitlines()[2:]
    assert row in lines
    listed = tp_validate("rules")
    assert tp_validate("rules", "--output-format", "concise") == listed
    assert tp_validate("rule", "TP002", "--output-format", "concise").out in listed.out
