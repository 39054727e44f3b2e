"""``tp-validate check`` on files, and what all subcommands share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jsonschema
import pytest

from tests.core.cli.conftest import Program
from torchtitan_tp_validate.cli import files
from torchtitan_tp_validate.errors import UnreadableError

ROOT = Path(__file__).parents[4]

REFUSAL = """\
{file} (by torchtitan's rule):
Tensor parallel degree (4) must divide num_key_value_heads (2). For qwen3_5_text, max supported TP is 2.

  TP002 num_key_value_heads = 2 is not a multiple of 4, in layer 1 (1 of 2):
        wk and wv are split by columns, so that every rank computes whole key-value heads.
  TP003 linear_num_key_heads = 6 is not a multiple of 4, in layer 0 (1 of 2):
        the query and key projections of a gated-delta layer are split by whole key heads.
  TP004 linear_num_value_heads = 6 is not a multiple of 4, in layer 0 (1 of 2):
        the value projections of a gated-delta layer are split by whole value heads.

Without this check: the run starts, and its first forward pass dies in attention with
  "shape '[...]' is invalid for input of size ...".
Degrees that work: 1, 2.
To change it: --parallelism.tensor_parallel_degree 2
"""


def test_what_fits_is_one_quiet_line(tp_validate: Program, config_file: Path) -> None:
    line = f"{config_file}: TP 2 fits qwen3_5_text by torchtitan's rule. Degrees that work: 1, 2.\n"
    assert tp_validate("check", "--hf-config", config_file, "--tp", "2") == (0, line, "")
    folder = tp_validate("check", "--hf-config", config_file.parent, "--tp", "2")
    assert folder.out == line.replace(str(config_file), str(config_file.parent))


def test_a_refusal_is_the_engines_text(tp_validate: Program, config_file: Path) -> None:
    expected = (1, REFUSAL.format(file=config_file), "")
    assert tp_validate("check", "--hf-config", config_file, "--tp", "4") == expected


def test_the_plan_is_chosen_and_said(tp_validate: Program, config_file: Path) -> None:
    config_file.write_text(
        config_file.read_text().replace('"linear_num_key_heads": 6', '"linear_num_key_heads": 5')
    )
    arguments = ("check", "--hf-config", config_file, "--tp", "2")
    assert tp_validate(*arguments).status == 1
    assert tp_validate(*arguments, "--plan", "transformers") == (
        0,
        f"{config_file}: TP 2 fits qwen3_5_text by transformers' rule. Degrees that work: 1, 2.\n",
        "",
    )


def test_the_framework_has_two_names(tp_validate: Program, config_file: Path) -> None:
    check = ("check", "--hf-config", config_file, "--tp", "2")
    assert tp_validate(*check, "--framework", "transformers") == tp_validate(*check, "--plan", "transformers")
    assert "by transformers' rule" in tp_validate(*check, "--framework", "transformers").out


LISTED = "Degrees that work for qwen3_5_text by torchtitan's rule: 1, 2. The binding constraint is TP002 "


def test_without_a_degree_those_that_work_are_listed(tp_validate: Program, config_file: Path) -> None:
    check = ("check", "--hf-config", config_file)
    line = f"{config_file}: {LISTED}num_key_value_heads = 2.\n"
    assert tp_validate(*check) == (0, line, "")
    assert tp_validate(*check, config_file) == (0, f"{line}{line}2 listed.\n", "")
    assert tp_validate(*check, "--output-format", "concise") == (0, line, "")
    assert tp_validate(*check, "--output-format", "github") == (0, "", "")
    assert tp_validate(*check, "--output-format", "markdown").out.splitlines()[2] == (
        f"| {config_file} |  | listed | TP002 num_key_value_heads = 2 | 1, 2 |"
    )
    (result,) = tp_validate(*check, "--output-format", "json").results
    assert (result["status"], result["valid_tp_degrees"], result["judgements"]) == ("listed", [1, 2], [])
    config_file.write_text('{"model_type": "mamba2", "num_heads": 4, "num_hidden_layers": 2}')
    assert tp_validate(*check).status == 2


def test_repeated_options_are_collected(tp_validate: Program, config_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(config_file.read_text())
    split = ("check", "--hf-config", config_file, "--tp", "4", "--hf-config", other, "--tp", "1-2,4")
    at_once = ("check", "--hf-config", config_file, other, "--tp", "1,2,4")
    for output_format in ("concise", "json", "markdown"):
        result = tp_validate(*split, "--output-format", output_format)
        assert result == tp_validate(*at_once, "--output-format", output_format)
        assert result.status == 1


def test_an_expert_degree_that_was_not_judged_is_not_called_fitting(
    tp_validate: Program, config_file: Path
) -> None:
    status, out, _ = tp_validate("check", "--hf-config", config_file, "--tp", "2", "--ep", "7")
    assert "EP 7 fits" not in out
    assert (status, out.startswith(f"{config_file}: TP 2 fits qwen3_5_text by")) == (0, True)
    assert out.endswith(" Not validated: EP001: the config has no number of experts.\n")


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "gpt2"])
def test_the_name_of_a_model_on_the_hub_gets_a_hint(tp_validate: Program, name: str) -> None:
    status, out, _ = tp_validate("check", "--hf-config", name, "--tp", "4")
    assert (status, out) == (
        2,
        f"{name}: {name} cannot be read: No such file or directory. If that is a model on the Hugging Face "
        "Hub: nothing is fetched here. Get its config first, with "
        f"'hf download {name} config.json --local-dir {name.rpartition('/')[2]}', and name that folder.\n",
    )


@pytest.mark.parametrize("name", ["models/llama.json", "./models/llama", "a/b/c"])
def test_the_name_of_a_file_gets_none(tp_validate: Program, name: str) -> None:
    out = tp_validate("check", "--hf-config", name, "--tp", "4").out
    assert out == f"{name}: {name} cannot be read: No such file or directory.\n"


@pytest.mark.parametrize(
    "content",
    ['{"compilerOptions": {"strict": true}}', '{"version": 1}', "[1, 2]", "// comment\n{}", "{}", "7"],
)
def test_a_file_that_is_no_model_config_can_be_skipped(
    tp_validate: Program, config_file: Path, tmp_path: Path, content: str
) -> None:
    other = tmp_path / "other.json"
    other.write_text(content)
    check = ("check", "--tp", "2", "--hf-config", config_file, other)
    assert tp_validate(*check).status == 2
    status, out, err = tp_validate(*check, "--skip-unrelated")
    assert (status, err) == (0, "")
    assert out.startswith(f"Skipped, not judged:\n  {other}: ")
    assert out.endswith("\n1 fit, 1 skipped.\n")
    assert tp_validate("check", "--skip-unrelated", "--hf-config", other).status == 0


@pytest.mark.parametrize(
    "content",
    [
        '{"model_type": "llama", "num_hidden_layers": 2}',
        '{"model_type": "llama", "num_attention_heads": 8',
        '{"num_attention_heads": "8", "num_hidden_layers": 2}',
        '{"architectures": ["LlamaForCausalLM"]}',
    ],
)
def test_a_broken_model_config_is_not_skipped(tp_validate: Program, tmp_path: Path, content: str) -> None:
    broken = tmp_path / "config.json"
    broken.write_text(content)
    assert tp_validate("check", "--tp", "2", "--skip-unrelated", "--hf-config", broken).status == 2
    assert tp_validate("check", "--tp", "2", "--skip-unrelated", "--hf-config", tmp_path / "no").status == 2


def test_a_range_says_which_degrees_fit(tp_validate: Program, config_file: Path) -> None:
    assert tp_validate("check", "--hf-config", config_file, "--tp", "1-64") == (
        1,
        f"{config_file}: 1, 2 of the TP degrees 1-64 fit by torchtitan's rule. "
        "The binding constraint is TP002 num_key_value_heads = 2.\n",
        "",
    )
    assert tp_validate("check", "--hf-config", config_file, "--tp", "1,2").status == 0


def test_many_files_are_summed_up(tp_validate: Program, config_file: Path, tmp_path: Path) -> None:
    copies = [tmp_path / f"{number}.json" for number in range(3)]
    for copy in copies:
        copy.write_text(config_file.read_text())
    assert tp_validate("check", "--tp", "2", "--hf-config", *copies) == (0, "3 fit.\n", "")
    copies[1].write_text('{"model_type": "mamba"}')
    status, out, _ = tp_validate("check", "--tp", "2", "--hf-config", *copies)
    assert status == 2
    assert out.startswith(f"{copies[1]}: Not validated: mamba has no attention heads.\n")
    assert out.endswith("\n1 could not be judged, 2 fit.\n")
    status, out, _ = tp_validate("check", "--tp", "4", "--hf-config", copies[0], copies[2])
    assert status == 1
    assert out.count("Degrees that work: 1, 2.") == 2
    assert out.endswith("\n2 do not fit.\n")


def test_concise_is_a_line_for_each(tp_validate: Program, config_file: Path) -> None:
    status, out, _ = tp_validate(
        "check", "--hf-config", config_file, "--tp", "4", "--output-format", "concise"
    )
    assert status == 1
    assert out == (
        f"{config_file}: TP 4 does not fit by torchtitan's rule: "
        "TP002 num_key_value_heads = 2 is not a multiple of 4 in layer 1 (1 of 2); "
        "TP003 linear_num_key_heads = 6 is not a multiple of 4 in layer 0 (1 of 2); "
        "TP004 linear_num_value_heads = 6 is not a multiple of 4 in layer 0 (1 of 2). "
        "Degrees that work: 1, 2.\n"
    )


def test_github_annotates_the_line(tp_validate: Program, config_file: Path) -> None:
    arguments = ("check", "--hf-config", config_file, "--output-format", "github", "--tp")
    assert tp_validate(*arguments, "2") == (0, "", "")
    status, out, _ = tp_validate(*arguments, "4")
    assert status == 1
    title = str(config_file).replace("%", "%25").replace(":", "%3A")
    assert out.startswith(
        f"::error title=tp-validate%3A {title},file={title},line=4::Tensor parallel degree (4)"
    )
    assert out.count("\n") == 1
    assert "For qwen3_5_text, max supported TP is 2.%0A%0A" in out


def test_markdown_is_a_table(tp_validate: Program, config_file: Path) -> None:
    arguments = ("check", "--hf-config", config_file, "--output-format", "markdown", "--tp")
    assert tp_validate(*arguments, "4").out == (
        "| name | asked for | verdict | binding constraint | degrees that work |\n"
        "| --- | --- | --- | --- | --- |\n"
        f"| {config_file} | TP 4 | **does not fit** | TP002 num_key_value_heads = 2 | 1, 2 |\n"
    )
    assert f"| {config_file} | yes | no |" in tp_validate(*arguments, "2,4").out


@pytest.mark.parametrize("tp", ["2", "4", "1-8"])
def test_json_keeps_to_its_schema(tp_validate: Program, config_file: Path, tp: str) -> None:
    schema = json.loads(resources.files("torchtitan_tp_validate.cli").joinpath("schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    missing = config_file.parent / "missing.json"
    result = tp_validate("check", "--tp", tp, "--output-format", "json", "--hf-config", config_file, missing)
    document = json.loads(result.out)
    jsonschema.validate(document, schema)
    assert document["summary"]["not_validated"] == 1
    judged, unread = document["results"]
    assert judged["valid_tp_degrees"] == [1, 2]
    assert [j["compatible"] for j in judged["judgements"]] == [
        j["degrees"]["tp"] in (1, 2) for j in judged["judgements"]
    ]
    assert unread["reason"] == f"{missing} cannot be read: No such file or directory."
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "schema_version": 2}, schema)


def test_the_result_goes_to_a_file(tp_validate: Program, config_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "result.txt"
    arguments = ("check", "--hf-config", config_file, "--tp", "4", "--output-file")
    assert tp_validate(*arguments, target) == (1, "", "")
    assert target.read_text() == REFUSAL.format(file=config_file)
    assert tp_validate(*arguments, tmp_path) == (
        2,
        "",
        f"tp-validate: {tmp_path} cannot be written: Is a directory.\n",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON: Expecting value: line 1 column 1 (char 0)."),
        (b'{"a": 1', "is not valid JSON: Expecting ',' delimiter: line 1 column 8 (char 7)."),
        (b"\x89PNG\r\n\x1a\n\x00", "is not valid JSON: it is not UTF-8 text ("),
        (b"[1, 2]", "holds a JSON list, not an object of names."),
        (b"7", "holds a JSON int, not an object of names."),
        (b'{"a": ' * 100_000, "is not read: its JSON is nested too deeply."),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit (4300 digits)"),
        (b"{}" + b" " * (16 * 2**20), "is not read: it is larger than 16 MiB."),
    ],
    ids=["empty", "truncated", "binary", "list", "number", "deep", "digits", "huge"],
)
def test_a_file_that_is_no_config_is_refused_with_the_reason(
    tp_validate: Program, tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    status, out, err = tp_validate("check", "--hf-config", file, "--tp", "2")
    assert (status, err) == (2, "")
    assert out.startswith(f"{file}: {file} {message}")


def test_a_byte_order_mark_is_no_harm(tp_validate: Program, config_file: Path) -> None:
    config_file.write_bytes(b"\xef\xbb\xbf" + config_file.read_bytes())
    assert tp_validate("check", "--hf-config", config_file, "--tp", "2").status == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tp_validate: Program, config_file: Path) -> None:
    config_file.chmod(0)
    assert (
        "cannot be read: Permission denied."
        in tp_validate("check", "--hf-config", config_file, "--tp", "2").out
    )


def test_a_toml_file_is_read_with_the_same_care(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    for content, message in ((b"a = ", "is not valid TOML"), (b"a = " + b"[" * 100_000, "nested too deeply")):
        file.write_bytes(content)
        with pytest.raises(UnreadableError, match=message):
            files.read_toml(str(file))
    file.write_text("[a]\nb = 1\n")
    assert files.read_toml(str(file)) == ({"a": {"b": 1}}, "[a]\nb = 1\n")


USAGE = "Try 'tp-validate check --help'.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name one thing to judge: -- and torchtitan's arguments, --model, or --hf-config"),
        (
            ("--model", "llama3", "--flavor", "8B"),
            "--tp is missing: which degree, or range of degrees?",
        ),
        (("--model", "llama3", "--tp", "2"), "--flavor is missing: which flavor of the model?"),
        (("--model", "a", "--hf-config", "x"), "name one thing to judge: -- and torchtitan's"),
        (("--tp", "2", "--", "--module", "x"), "the run has its own TP degree: give it after --"),
        (("--tp", "0"), "argument --tp: '0' is not a whole number from 1 to 1073741824"),
        (("--tp", "4-2"), "argument --tp: the range 4-2 runs backwards"),
        (("--tp", "1-9999"), "argument --tp: the range 1-9999 has more than 4096 degrees"),
        (("--tp", "-1"), "argument --tp: '-1' is negative, or a range without its beginning: degrees start"),
        (("--tp", "1-"), "argument --tp: the range 1- has no end: write 1-64, for example"),
        (
            ("--tp", "a"),
            "argument --tp: 'a' is not a degree: write a number as 4, a range as 1-64, or a list",
        ),
        (("--tp", "2,,4"), "argument --tp: a degree is missing in '2,,4', beside a comma: write 4, 1-64 or"),
        (("--tp", ""), "argument --tp: a degree is missing: write 4, 1-64 or 2,4,8"),
        (
            ("--plan", "transformer"),
            "argument --framework/--plan: there is no 'transformer'; did you mean transformers?",
        ),
        (("--hf-confg", "x"), "there is no option '--hf-confg'; did you mean --hf-config?"),
        (("-tp", "4"), "there is no option '-tp'; did you mean --tp?"),
        (("--output_format=json",), "there is no option '--output_format'; did you mean --output-format?"),
        (
            ("config.json", "--tp", "4"),
            "'config.json' is one argument too many; files follow --hf-config, and a run's arguments",
        ),
        (("--model", "a", "--model", "b"), "argument --model: is given twice: which one?"),
        (("--hf-config", "x", "--ep", "2", "--ep", "4"), "argument --ep: is given twice: which one?"),
        (
            ("--hf-config", "x", "--tp", "2", "--cp", "7"),
            "--cp changes nothing without --seq-len: the sequence is what both cut",
        ),
        (
            ("--hf-config", "x", "--flavor", "8B"),
            "--flavor changes nothing for a Hugging Face config by torchtitan's rule",
        ),
        *(
            (
                ("--framework", "transformers", "--hf-config", "x", *option),
                f"{option[0]} changes nothing for a Hugging Face config by transformers' rule",
            )
            for option in (
                ("--ep", "7"),
                ("--seq-len", "7"),
                ("--cp", "2", "--seq-len", "8"),
                ("--spmd-backend", "full_dtensor"),
                ("--replicate-kv-heads",),
            )
        ),
        *(
            ((*option, "--", "--module", "x"), f"{option[0]} changes nothing for a run, which has its own")
            for option in (("--ep", "7"), ("--seq-len", "7"), ("--flavor", "8B"))
        ),
        (
            ("--model", "llama3", "--flavor", "8B", "--tp", "2", "--framework", "transformers"),
            "--framework changes nothing for a model of torchtitan",
        ),
        (
            ("--output-format", "x"),
            "argument --output-format: there is no 'x'; choose from full, concise, json",
        ),
    ],
)
def test_bad_usage_says_what_is_missing(
    tp_validate: Program, arguments: tuple[str, ...], message: str
) -> None:
    status, out, err = tp_validate("check", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"tp-validate check: {message}")
    assert err.endswith(USAGE)


def test_a_subcommand_that_is_nearly_right_is_suggested(tp_validate: Program) -> None:
    err = (
        "tp-validate: argument COMMAND: there is no 'adit'; did you mean audit?\nTry 'tp-validate --help'.\n"
    )
    assert tp_validate("adit") == (2, "", err)


def test_only_commands_about_a_run_take_torchtitans_arguments(tp_validate: Program) -> None:
    status, _, err = tp_validate("rules", "--", "--module", "llama3")
    assert (status, err.splitlines()[0]) == (
        2,
        "tp-validate rules: only check, layouts, rehearse take torchtitan's arguments after --",
    )


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, "-m", "torchtitan_tp_validate", *arguments],
        env={**env, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_python_m_is_the_same_program_and_loads_nothing_heavy(config_file: Path) -> None:
    code = (
        "import sys; from torchtitan_tp_validate.cli import main; "
        f"status = main(['check', '--hf-config', {str(config_file)!r}, '--tp', '4']); "
        "heavy = {'torch', 'torchtitan', 'transformers', 'rich', 'wrapt'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else status)"
    )
    direct = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    module = program("check", "--hf-config", str(config_file), "--tp", "4")
    assert (module.returncode, module.stdout, module.stderr) == (
        direct.returncode,
        direct.stdout,
        direct.stderr,
    )
    assert module.returncode == 1


def test_color_is_for_terminals_that_want_it(config_file: Path) -> None:
    arguments = ("check", "--hf-config", str(config_file), "--tp", "4")
    plain = REFUSAL.format(file=config_file)
    assert program(*arguments).stdout == plain
    assert program(*arguments, FORCE_COLOR="1", NO_COLOR="1").stdout == plain
    colored = program(*arguments, FORCE_COLOR="1", TERM="xterm").stdout
    assert "\x1b[1;31mTensor parallel degree (4) must divide" in colored


def test_a_reader_that_goes_away_is_no_error(config_file: Path) -> None:
    options = ["--tp", "1-64", "--output-format", "json", "--hf-config", *[str(config_file)] * 20]
    command = [sys.executable, "-m", "torchtitan_tp_validate", "check", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 2


def test_the_package_has_its_functions_and_no_module_takes_the_name_of_one() -> None:
    code = (
        "import pkgutil; import torchtitan_tp_validate.guards; import torchtitan_tp_validate as t; "
        "assert callable(t.install), t.install; from torchtitan_tp_validate import install; "
        "assert install is t.install; assert 'valid_tp_degrees' in dir(t); "
        "[getattr(t, name) for name in t.__all__]; "
        "assert not {module.name for module in pkgutil.iter_modules(t.__path__)} & {*t.__all__}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
