"""Every command through the same formats, and a format in one function."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.core.cli.conftest import Program
from torchtitan_tp_validate.cli import formats, torchtitan
from torchtitan_tp_validate.cli.commands import audit, hf_audit, table
from torchtitan_tp_validate.cli.formats import FORMATS, Findings
from torchtitan_tp_validate.cli.output import Line
from torchtitan_tp_validate.cli.verdicts import Report
from torchtitan_tp_validate.rules import LINES
from torchtitan_tp_validate.transformers_tp.audit import HeadAudit, Linear, NotAudited, PlanAudit

COMMANDS = ("check", "table", "audit", "hf-audit", "rule", "rules", "doctor")
HEAD = HeadAudit("lm_head", (128, 64), None, (), None, 16384)
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
    monkeypatch.setattr(hf_audit, "transformers_version", lambda: "5.9")
    monkeypatch.setattr(hf_audit, "audit_installed", lambda names: iter([PLANS[name] for name in names]))
    monkeypatch.setattr(hf_audit, "audited_classes", lambda: list(PLANS))
    return {
        "check": ["check", "--hf-config", str(config_file), "--tp", "4"],
        "rule": ["rule", "TP002"],
        **{command: [command] for command in COMMANDS if command not in ("check", "rule")},
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_new_format_is_one_function(
    tp_validate: Program,
    command_lines: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr(formats, "FORMATS", dict(FORMATS))

    @formats.output_format("bullets between cells")
    def bullets(findings: Findings[Any]) -> Iterator[Line]:
        yield "\N{BULLET}".join(findings.columns), ""
        for thing in findings.things:
            yield "\N{BULLET}".join(text for text, _ in findings.cells(thing)), ""

    words = command_lines[command]
    assert "bullets (bullets between cells)" in tp_validate(command, "--help").out.replace(
        "\n" + " " * 24, " "
    )
    status, out, _ = tp_validate(*words, "--output-format", "bullets")
    assert status == tp_validate(*words).status
    lines = out.splitlines()
    assert len(lines) > 1
    assert {line.count("\N{BULLET}") for line in lines} == {lines[0].count("\N{BULLET}")}
    file = tmp_path / "result"
    assert tp_validate(*words, "--output-format", "bullets", "--output-file", file) == (status, "", "")
    assert file.read_text(encoding="utf-8") == out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_same_formats(
    tp_validate: Program, command_lines: dict[str, list[str]], command: str
) -> None:
    for name in FORMATS:
        status, out, err = tp_validate(*command_lines[command], "--output-format", name)
        if name == "github" and command in ("rule", "rules"):  # nothing of theirs stands in anybody's file
            assert (status, "there is no 'github'; choose from full, concise, json, markdown" in err) == (
                2,
                True,
            )
            continue
        assert status == tp_validate(*command_lines[command]).status
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
    headings = ["code", "dimension", *(line.value for line in LINES), "what to do", "for example"]
    assert lines[:2] == [f"| {' | '.join(headings)} |", "| --- " * len(headings) + "|"]
    assert any(
        "| TP005 | feed_forward_hidden_dim | dies in forward | **silently wrong** |" in line for line in lines
    )
    (row,) = tp_validate("rule", "TP002", "--output-format", "markdown").out.splitlines()[2:]
    assert row in lines
    listed = tp_validate("rules")
    assert tp_validate("rules", "--output-format", "concise") == listed
    assert tp_validate("rule", "TP002", "--output-format", "concise").out in listed.out
