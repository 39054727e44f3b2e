"""``rules``, ``rule``, ``doctor``, ``completion``, and the hooks."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.core.cli.conftest import SUBCOMMANDS, Program
from torchtitan_tp_validate.cli import build_parser
from torchtitan_tp_validate.rules import RULES

ROOT = Path(__file__).parents[3]


def test_every_rule_is_listed_and_explained(tp_validate: Program) -> None:
    status, out, _ = tp_validate("rules")
    assert (status, [line.split()[0] for line in out.splitlines()]) == (0, list(RULES))
    for code, rule in RULES.items():
        status, out, _ = tp_validate("rule", code.lower())
        assert status == 0
        assert out.startswith(f"{code}: {rule.dim}\n")
        assert rule.why in out
        assert out.endswith(f"\nSource: {rule.source}\n")
        assert all(told in out for told in rule.in_short.values())


def test_a_rule_in_full(tp_validate: Program) -> None:
    assert tp_validate("rule", "TP002").out == (
        "TP002: n_kv_heads\n\n"
        "The tensor parallel degree must fit n_kv_heads: wk and wv are split by columns, so that every rank "
        "computes whole key-value heads.\n\n"
        "When it does not, and nobody checks:\n"
        "  torchtitan 0.2.x:         dies in forward\n"
        "  0.3.x, spmd_types:        first layer refused late, later ones die\n"
        "  0.3.x, DTensor backends:  the same\n\n"
        "Source: torchtitan models/*/parallelize.py; https://github.com/pytorch/torchtitan/issues/2574\n"
    )


def schema(name: str) -> Any:
    return json.loads(resources.files("torchtitan_tp_validate.cli").joinpath(name).read_text())


def test_rules_as_json(tp_validate: Program, tmp_path: Path) -> None:
    every = json.loads(tp_validate("rules", "--output-format", "json").out)
    jsonschema.validate(every, schema("schema-rules.json"))
    assert [rule["code"] for rule in every["rules"]] == list(RULES)
    target = tmp_path / "rule.json"
    assert tp_validate("rule", "tp002", "--output-format", "json", "--output-file", target).status == 0
    one = json.loads(target.read_text())
    jsonschema.validate(one, schema("schema-rules.json"))
    assert one["rules"] == [every["rules"][list(RULES).index("TP002")]]
    assert one["rules"][0]["ignored"]["torchtitan 0.2.x"] == "dies in forward"


@pytest.mark.parametrize("word", ["TP02", "tp2", "2", "TP-002", "tp_2"])
def test_a_code_that_is_nearly_right_is_suggested(tp_validate: Program, word: str) -> None:
    line = f"tp-validate rule: argument CODE: there is no '{word}'; did you mean TP002?\n"
    assert tp_validate("rule", word) == (2, "", f"{line}Try 'tp-validate rule --help'.\n")
    assert "did you mean EP001?" in tp_validate("rule", "EP1").err
    assert "choose from TP001, " in tp_validate("rule", "xyz").err


def test_the_doctor_as_json(tp_validate: Program) -> None:
    status, out, _ = tp_validate("doctor", "--output-format", "json")
    document = json.loads(out)
    jsonschema.validate(document, schema("schema-doctor.json"))
    assert status == int(any(target["faulty"] for target in document["targets"]))
    assert document["problem"] is None
    assert {"python", "torch"} <= set(document["versions"])


def test_a_completion_script_completes(tp_validate: Program, tmp_path: Path) -> None:
    status, script, _ = tp_validate("completion", "bash")
    assert status == 0
    assert "doctor" in script
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    file = tmp_path / "completion.sh"
    file.write_text(script)
    function = re.search(r"complete .*-F (\w+) tp-validate", script)
    assert function is not None
    ask = f"source {file}; COMP_WORDS=(tp-validate doc); COMP_CWORD=1; {function[1]}; echo ${{COMPREPLY[@]}}"
    answer = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=60)
    assert answer.stdout.split() == ["doctor"], answer.stderr


def typed_in_bash(script: Path, folder: Path, line: str) -> str:
    """What an interactive bash that has evaluated the script makes of a line and the tabulator."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ.update(TERM="dumb", PS1="$ ", INPUTRC="/dev/null", HISTFILE="")
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    seen = ""

    def read_until(ending: str) -> str:
        nonlocal seen
        deadline = time.monotonic() + 20
        while ending not in seen and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 65536).decode()
        found, _, seen = seen.partition(ending)
        return found

    def send(text: str) -> None:
        os.write(terminal, text.encode())

    try:
        send(f'eval "$(cat {script})"; echo re""ady\n')
        read_until("ready")
        read_until("$ ")
        # The line is not run, but printed as it then stands: Ctrl-A goes to its beginning.
        send(f"{line}\t\x01printf '<%s>' \x05; echo do\"\"ne\n")
        return read_until("done")
    finally:
        with contextlib.suppress(OSError):
            send("\x03exit\n")
        os.close(terminal)
        os.waitpid(pid, 0)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("check --hf-config lla", ["check", "--hf-config", "llama-dir/"]),
        (r"check --hf-config my\ model/co", ["check", "--hf-config", "my model/config.json"]),
        ("check --hf-config job.toml lla", ["check", "--hf-config", "job.toml", "llama-dir/"]),
        ("check -- --job.config_file jo", ["check", "--", "--job.config_file", "job.toml"]),
        ("audit jo", ["audit", "job.toml"]),
        ("check --output-file jo", ["check", "--output-file", "job.toml"]),
        ("doc", ["doctor"]),
        ("check --framework tr", ["check", "--framework", "transformers"]),
    ],
)
def test_a_completion_script_leaves_file_names_to_bash(
    tp_validate: Program, tmp_path: Path, line: str, completed: list[str]
) -> None:
    script = tmp_path / "completion.sh"
    script.write_text(tp_validate("completion", "bash").out)
    folder = tmp_path / "folder"
    for name in ("llama-dir/x", "my model/config.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    (folder / "job.toml").touch()
    shown = typed_in_bash(script, folder, f"tp-validate {line}")
    assert re.findall("<([^<>]*)>", shown)[-len(completed) - 1 :] == ["tp-validate", *completed], shown


@pytest.mark.parametrize(
    ("shell", "offers"),
    [
        ("zsh", r'_check_options=\(\n  "\*:file:_files"'),
        ("zsh", r'"--hf-config\[.*:_files"'),
        ("tcsh", r"'p/\*/f/'"),
        ("tcsh", r"'n/--hf-config/f/'"),
    ],
)
def test_the_other_shells_are_offered_file_names_too(tp_validate: Program, shell: str, offers: str) -> None:
    assert re.search(offers, tp_validate("completion", shell).out)


def test_without_shtab_completion_says_what_to_install(
    tp_validate: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert tp_validate("completion", "zsh") == (
        2,
        "",
        "tp-validate: completion needs shtab: pip install shtab (or 'torchtitan-tp-validate[completion]').\n",
    )


def test_help_names_every_subcommand_and_the_exit_statuses(tp_validate: Program) -> None:
    status, out, _ = tp_validate("--help")
    assert status == 0
    for word in (*SUBCOMMANDS, "0 all fits, 1 something"):
        assert word in out
    assert "\nexamples:\n  tp-validate check --hf-config " in out
    assert tp_validate("-V") == tp_validate("--version")
    assert tp_validate("-V").out.startswith("tp-validate ")


@pytest.mark.parametrize("command", [*SUBCOMMANDS, "hf-audit"])
def test_every_help_has_examples_that_are_understood(tp_validate: Program, command: str) -> None:
    status, out, _ = tp_validate(command, "--help")
    assert status == 0
    _, _, examples = out.partition("\nexamples:\n")
    lines = [line for line in examples.splitlines() if "tp-validate " in line]
    assert lines
    for line in lines:
        (words,) = re.findall(rf"tp-validate ({command}\b[^|>()]*)", line)
        arguments = shlex.split(words.rstrip('"'))
        ours = arguments[: arguments.index("--")] if "--" in arguments else arguments
        assert build_parser(command).parse_args(ours).command == command


def test_the_hooks_call_what_exists(tp_validate: Program, config_file: Path) -> None:
    text = (ROOT / ".pre-commit-hooks.yaml").read_text()
    entries = re.findall(r"entry: tp-validate (.*)", text)
    assert [entry.split()[0] for entry in entries] == ["check", "audit"]
    args = re.search(r"args: \[(.*)\]", text)
    assert args is not None
    words = [word.strip().strip('"') for word in args[1].split(",")]
    # pre-commit puts the changed files last
    hook = (*entries[0].split(), *words)
    assert tp_validate(*hook, config_file).status == 1
    unrelated = config_file.parent / "tool.json"
    unrelated.write_text('{"compilerOptions": {"strict": true}}')
    status, out, _ = tp_validate(*hook, unrelated)
    assert (status, out.startswith(f"Skipped, not judged:\n  {unrelated}: ")) == (0, True)
    patterns = re.findall(r"files: (.*)", text)
    assert re.search(patterns[0], "models/a/config.json")
    assert not re.search(patterns[0], "models/a/tokenizer_config.json")
