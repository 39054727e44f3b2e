"""``completion``."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.core.cli.conftest import Program


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
