"""Names and paths of others, in every format: they are shown, and do nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tests.core.cli.conftest import Program
from torchtitan_tp_validate.cli import formats
from torchtitan_tp_validate.cli.verdicts import Report, Verdicts

ROOT = Path(__file__).parents[3]
ESC, OVERRIDE = "\x1b[2J", "\u202egnp.exe"
HOSTILE = {
    "command": "x\n::error::pwned",
    "first": "::error title=pwned::y",
    "legacy": "x ##[error]pwned ##vso[task.complete]",
    "escape": f"a{ESC}b",
    "bidi": f"a{OVERRIDE}",
    "return": "a\rb\x85c\u2028d",
    "table": "a|b\\|c",
    "markup": "`code` <img src=x onerror=y> [link](http://evil) *b* @someone #1 https://evil.example",
    "backslash": "a\\",
}
anything = pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
TEXTS = st.one_of(st.text(), st.text("`|\\<>[]()*_~#@!:\n\r ab\x1b\u202e"))


def is_a_command(line: str) -> bool:
    """Whether GitHub's runner, or that of Azure, would take the line as one to itself."""
    return line.strip().startswith("::") or "##[" in line or "##vso[" in line


@pytest.fixture
def hostile(tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    """A config with such a name, that can be judged; folders are made where it has a slash."""
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(config_file.read_text())
    return name


@anything
@pytest.mark.parametrize("output_format", ["full", "concise"])
@pytest.mark.parametrize("tp", ["2", "4", "1-4"])
def test_a_path_says_nothing_to_a_terminal_or_a_runner(
    tp_validate: Program, hostile: str, output_format: str, tp: str
) -> None:
    for path in (hostile, f"{hostile}.missing"):
        command = ("check", "--hf-config", path, "--tp", tp, "--output-format", output_format)
        _, out, err = tp_validate(*command)
        assert all(line.isprintable() for line in out.split("\n")), out
        assert not any(map(is_a_command, out.split("\n"))), out
        assert err == ""
        assert "x3a:error title=pwned" in out or "::error title=" not in path


@anything
def test_a_path_stays_within_its_annotation(tp_validate: Program, hostile: str) -> None:
    for path in (hostile, f"{hostile}.missing"):
        out = tp_validate("check", "--hf-config", path, "--tp", "4", "--output-format", "github").out
        assert out.isascii() or out[:-1].isprintable()
        assert out.count("\n") == 1
        properties, _, message = out.removeprefix("::error ").partition("::")
        assert [word.partition("=")[0] for word in properties.split(",")][:2] == ["title", "file"], out
        assert message


@anything
def test_a_path_is_one_plain_cell_of_a_table(tp_validate: Program, hostile: str) -> None:
    for path in (hostile, f"{hostile}.missing"):
        out = tp_validate("check", "--hf-config", path, "--tp", "4", "--output-format", "markdown").out
        assert len(out.splitlines()) == 3
        html = MarkdownIt("gfm-like", {"linkify": False}).render(out)
        assert html.count("<td>") == 5, html
        assert not any(tag in html for tag in ("<img", "<a ", "<em>")), html


@anything
def test_json_has_the_path_as_it_is(tp_validate: Program, hostile: str) -> None:
    out = tp_validate("check", "--hf-config", hostile, "--tp", "4", "--output-format", "json").out
    assert out.isascii()
    (result,) = json.loads(out)["results"]
    assert result["name"] == result["location"]["file"] == hostile


@anything
def test_a_complaint_is_a_line_of_text(tp_validate: Program, tmp_path: Path, name: str) -> None:
    for arguments in (
        ("check", name),
        ("check", "--tp", name),
        ("check", f"--{name}"),
        (name,),
        ("rule", name),
        ("check", "--hf-config", "x", "--tp", "2", "--output-file", f"{tmp_path}/no/{name}"),
    ):
        status, out, err = tp_validate(*arguments)
        assert (status, out) == (2, "")
        assert len(err.splitlines()) <= 2, err
        assert all(line.isprintable() and not is_a_command(line) for line in err.split("\n")), err


@settings(deadline=None)
@given(TEXTS)
def test_any_text_is_one_printable_line_for_a_terminal(text: str) -> None:
    shown = formats.terminal(text)
    assert shown.isprintable()
    assert not is_a_command(shown)
    assert shown == text or not text.isprintable() or is_a_command(text) or "##" in text


@settings(deadline=None)
@given(TEXTS)
def test_any_text_is_literal_in_markdown(text: str) -> None:
    row = f"| a | b |\n| --- | --- |\n| {formats.literal(text)} | end |\n"
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(row)
    cells = [token for token in tokens if token.type == "inline"]
    assert len(cells) == 4, row
    assert cells[3].content == "end"
    kinds = {child.type for child in cells[2].children or ()}
    assert kinds <= {"text", "code_inline"}, row


@pytest.mark.parametrize(
    "text", ["llama3_8b", "a/b-c/config.json", "Not validated: x has no heads (nor y). Why?", "TP 2 = 4"]
)
def test_what_needs_no_escape_has_none(text: str) -> None:
    for function in (formats.terminal, formats.github_message, formats.literal):
        assert function(text) == text


def test_reasons_of_several_lines_keep_them_where_there_is_room(tp_validate: Program) -> None:
    report = Report("a\nb", note="first:\n  second")
    verdicts = Verdicts("check", many=False)
    assert [line for line, _ in verdicts.full(report)] == ["a\\nb: first:", "  second"]
    assert verdicts.line(report) == "a\nb: not validated: first:   second"


def test_the_launcher_says_it_as_harmlessly() -> None:
    code = (
        "import os; from torchtitan_tp_validate.train import _say; "
        "os.environ['RANK'] = '0'; _say('a\\x1b[2J\\n::error::b\\u202e'); "
        "os.environ['RANK'] = '3'; _say('a\\x1b[2J\\n::error::b')"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr.splitlines()) == (
        0,
        ["a\\x1b[2J", "\\x3a:error::b\\u202e", "[rank 3] a\\x1b[2J"],
    )
