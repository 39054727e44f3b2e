"""Bad conditions: one thing fails, nothing can be written, what is read is no file, there is too much."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.core.cli.conftest import Program
from torchtitan_tp_validate.cli import files
from torchtitan_tp_validate.cli.commands import audit, check
from torchtitan_tp_validate.cli.formats import FORMATS
from torchtitan_tp_validate.cli.verdicts import Judgement, Report
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.errors import UnreadableError
from torchtitan_tp_validate.releases import huggingface

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads(resources.files("torchtitan_tp_validate.cli").joinpath("schema.json").read_text())
FOUND = "This is a fault of tp-validate, not of yours: please report it with this line, the input and the "


def shell(command: str, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which ``$0`` is Python and ``$@`` are the arguments of tp-validate."""
    line = command.replace("tp-validate", '"$0" -m torchtitan_tp_validate')
    return subprocess.run(
        ["sh", "-c", line, sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def broken_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that nobody foresaw what it does with a config of 7 layers."""
    real = huggingface.read

    def read(config: Any, *args: Any, **kwargs: Any) -> Any:
        if config.get("num_hidden_layers") == 7:
            return {}["of\nseven"]
        return real(config, *args, **kwargs)

    monkeypatch.setattr(huggingface, "read", read)


@pytest.mark.usefixtures("broken_reader")
@pytest.mark.parametrize("output_format", FORMATS)
def test_one_config_that_the_program_stumbles_over_hides_no_other(
    tp_validate: Program, config_file: Path, tmp_path: Path, output_format: str
) -> None:
    content = json.loads(config_file.read_text())
    for name, n_layers in (("seven", 7), ("later", 2)):
        odd = {**content, "num_hidden_layers": n_layers}
        (tmp_path / f"{name}.json").write_text(json.dumps(odd))
    command = ("check", "--tp", "4", "--output-format", output_format, "--hf-config")
    status, out, err = tp_validate(*command, config_file, tmp_path / "seven.json", tmp_path / "later.json")
    assert (status, err) == (2, "")
    assert "Traceback" not in out
    for name in ("config.json", "seven.json", "later.json"):
        assert name in out
    said = re.sub(r"`|\(at \S+:\d+\)", "", out)
    assert "Not validated: an unexpected KeyError: 'of\\nseven' " in said.replace("\\\\", "\\")
    assert FOUND in out


def test_a_config_whose_layers_are_no_numbers_is_named_and_the_next_one_judged(
    tp_validate: Program, config_file: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd.json"
    content = {"model_type": "kimi_linear", "num_attention_heads": 4, "num_hidden_layers": 2}
    odd.write_text(json.dumps({**content, "linear_attn_config": {"full_attn_layers": "abc"}}))
    command = ("check", "--tp", "2", "--output-format", "concise", "--hf-config")
    status, out, _ = tp_validate(*command, odd, config_file)
    assert status == 2
    first, second = out.splitlines()
    assert first.startswith(f"{odd}: Not validated: ")
    assert second.startswith(f"{config_file}: TP 2 fits")


def test_one_job_that_the_program_stumbles_over_hides_no_other() -> None:
    def stumble() -> Report:
        raise KeyError("seven")

    odd = audit._Job("odd", stumble).report()
    assert (odd.name, odd.status.value) == ("odd", "not_validated")
    assert odd.note.startswith("Not validated: an unexpected KeyError: 'seven' (at ")
    fine = Report("fine", (Judgement(Degrees(tp=2), None),))
    assert audit._Job("fine", lambda: fine).report() is fine


def test_the_program_itself_stumbling_is_no_verdict(
    tp_validate: Program, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_check_options", lambda options: {}["x"])
    status, out, err = tp_validate("check", "--hf-config", config_file, "--tp", "4")
    assert (status, out) == (2, "")
    assert err.startswith("tp-validate: Not validated: an unexpected KeyError: 'x' (at commands/check.py:")
    assert len(err.splitlines()) == 1


FULL = "tp-validate: the result cannot be written to standard output: No space left on device.\n"
CLOSED = "tp-validate: the result cannot be written: standard output is closed.\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [("check", "--hf-config", "FILE", "--tp", "4"), ("rules",)])
def test_standard_output_that_takes_nothing_is_an_error_of_one_line(
    config_file: Path, arguments: Sequence[str]
) -> None:
    words = [str(config_file) if word == "FILE" else word for word in arguments]
    ended = shell('tp-validate "$@" > /dev/full', *words)
    assert (ended.returncode, ended.stderr) == (2, FULL)
    ended = shell('tp-validate "$@" >&-', *words)
    assert (ended.returncode, ended.stderr) == (2, CLOSED)
    ended = shell('FORCE_COLOR=1 NO_COLOR= TERM=xterm tp-validate "$@" > /dev/full', *words)
    assert (ended.returncode, ended.stderr) == (2, FULL)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_help_that_cannot_be_written_is_an_error_of_one_line() -> None:
    ended = shell("tp-validate check --help > /dev/full")
    line = "tp-validate: standard output does not take the result: No space left on device.\n"
    assert (ended.returncode, ended.stderr) == (2, line)


def test_a_result_goes_to_a_file_without_a_standard_output(config_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "result"
    ended = shell('tp-validate check --tp 2 --hf-config "$@" >&-', config_file, "--output-file", target)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "TP 2 fits" in target.read_text()


@pytest.mark.parametrize("link", ["itself", "symlink", "hardlink", "folder", "standard input"])
@pytest.mark.parametrize("output_format", ["full", "json"])
def test_an_input_is_never_overwritten(
    config_file: Path, tmp_path: Path, link: str, output_format: str
) -> None:
    before, target = config_file.read_text(), tmp_path / "link.json"
    if link == "symlink":
        target.symlink_to(config_file)
    elif link == "hardlink":
        target.hardlink_to(config_file)
    else:
        target = config_file
    judged: Path | str = {"folder": tmp_path, "standard input": "-"}.get(link, config_file)
    command = 'tp-validate check --tp 2 --hf-config "$1" --output-file "$2" --output-format "$3" < "$4"'
    ended = shell(command, judged, target, output_format, config_file)
    assert (ended.returncode, ended.stdout) == (2, "")
    message = f"tp-validate: --output-file {target} would overwrite an input"
    if link != "itself":
        read = "standard input" if link == "standard input" else config_file
        message += f", which is the same file as {read}" if target != read else ""
    assert ended.stderr == f"{message}: nothing was judged or written. Name another file.\n"
    assert config_file.read_text() == before


def test_a_job_is_never_overwritten(tp_validate: Program, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text("[model]\n")
    for flag in (["--job.config_file", str(job)], [f"--job.config_file={job}"]):
        status, _, err = tp_validate("check", "--output-file", job, "--", *flag)
        assert (status, f"--output-file {job} would overwrite an input" in err) == (2, True)
    assert job.read_text() == "[model]\n"


def test_a_result_replaces_a_file_whole_and_keeps_its_mode_and_its_link(
    tp_validate: Program, config_file: Path, tmp_path: Path
) -> None:
    target, link = tmp_path / "result", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    before = target.stat().st_ino
    assert tp_validate("check", "--hf-config", config_file, "--tp", "2", "--output-file", link).status == 0
    assert link.is_symlink()
    assert "TP 2 fits" in target.read_text()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert target.stat().st_ino != before
    new = tmp_path / "new"
    assert tp_validate("check", "--hf-config", config_file, "--tp", "2", "--output-file", new).status == 0
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(new.stat().st_mode) == 0o666 & ~mask


def test_a_result_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.write_text("old")

    def write() -> None:
        with files.replacing(str(target)) as stream:
            stream.write("new\n" * 100_000)
            raise OSError(28, "No space left on device")

    with pytest.raises(UnreadableError, match=r"result cannot be written: No space left on device\.$"):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_open_already_is_written_to_as_it_is(config_file: Path, tmp_path: Path) -> None:
    command = 'tp-validate check --tp 2 --output-file /dev/stdout --hf-config "$1"'
    assert "TP 2 fits" in shell(f"{command} | cat", config_file).stdout
    log = tmp_path / "log"
    ended = shell(f'(echo first; {command}) > "$2"', config_file, log)
    assert ended.returncode == 0, ended.stderr
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["first", f"{config_file}:"]


def test_only_regular_files_are_read(tp_validate: Program, tmp_path: Path) -> None:
    fifo, folder, sock = tmp_path / "fifo", tmp_path / "folder", tmp_path / "socket"
    os.mkfifo(fifo)
    (folder / "config.json").mkdir(parents=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.relpath(sock))
    reasons = {
        fifo: "a named pipe, not a regular file (to read from a pipe, name - and pipe it to standard input).",
        Path("/dev/zero"): "a device, not a regular file.",
        sock: "a socket, not a regular file.",
    }
    try:
        for path, reason in reasons.items():
            status, out, _ = tp_validate("check", "--hf-config", path, "--tp", "2")
            assert (status, out) == (2, f"{path}: {path} cannot be read: it is {reason}\n")
            with pytest.raises(UnreadableError, match="not a regular file"):
                files.read_toml(str(path))
    finally:
        listener.close()
    status, out, _ = tp_validate("check", "--hf-config", folder, "--tp", "2")
    assert (status, "it is a folder, not a regular file." in out) == (2, True)


def test_a_pipe_is_read_from_standard_input(config_file: Path) -> None:
    for command in ('cat "$1" | tp-validate check --tp 2 --hf-config -',):
        ended = shell(command, config_file)
        line = "standard input: TP 2 fits qwen3_5_text by torchtitan's rule. Degrees that work: 1, 2.\n"
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, line, "")
    ended = shell('tp-validate check --tp 2 --hf-config - --output-format json < "$1"', config_file)
    document = json.loads(ended.stdout)
    jsonschema.validate(document, SCHEMA)
    assert (document["results"][0]["name"], document["results"][0]["location"]) == ("standard input", None)
    assert "cannot be read: it is closed." in shell("tp-validate check --tp 2 --hf-config - <&-").stdout
    status = shell('tp-validate check --tp 2 --hf-config - - < "$1"', config_file)
    assert "argument" not in status.stdout
    assert status.stderr.startswith(
        "tp-validate check: --hf-config: standard input (-) can be read once only"
    )


def test_what_is_no_text_on_standard_input_is_named(config_file: Path) -> None:
    ended = shell("echo '{' | tp-validate check --tp 2 --hf-config -")
    assert ended.returncode == 2
    assert ended.stdout.startswith("standard input: standard input is not valid JSON: ")


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_result_is_written_before_the_next_thing_is_judged(
    tp_validate: Program,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output_format: str,
) -> None:
    """So that memory does not grow with files and degrees: few reports are alive at once."""
    alive, most = 0, 0

    class Counted(Report):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            nonlocal alive, most
            super().__init__(*args, **kwargs)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(check, "Report", Counted)
    command = ("check", "--tp", "1-8", "--output-format", output_format, "--hf-config")
    assert tp_validate(*command, *[config_file] * 40, "--output-file", tmp_path / "out").status == 1
    assert most <= 4
    if output_format == "json":
        document = json.loads((tmp_path / "out").read_text())
        jsonschema.validate(document, SCHEMA)
        assert (len(document["results"]), document["summary"]["incompatible"]) == (40, 40)


def test_a_document_ends_with_its_summary_however_few_its_results(
    tp_validate: Program, config_file: Path
) -> None:
    missing = config_file.parent / "missing.json"
    command = ("check", "--tp", "1-4", "--output-format", "json", "--hf-config")
    both, one, other = (
        json.loads(tp_validate(*command, *paths).out)
        for paths in ((config_file, missing), (config_file,), (missing,))
    )
    assert both["results"] == one["results"] + other["results"]
    assert list(both) == ["schema_version", "tool", "command", "results", "summary"]
    assert {name: count for name, count in both["summary"].items() if count} == {
        "incompatible": 1,
        "not_validated": 1,
    }
