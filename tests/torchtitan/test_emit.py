"""A run that is written down in another layout is, to torchtitan's own parser, that run in that layout."""

from __future__ import annotations

import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.core.cli.conftest import Program
from tests.torchtitan.test_search import OLD, RUN
from torchtitan_tp_validate import registry
from torchtitan_tp_validate.cli.emit import _changes
from torchtitan_tp_validate.degrees import FLAGS
from torchtitan_tp_validate.errors import UsageError
from torchtitan_tp_validate.hardware import build_for_its_hardware
from torchtitan_tp_validate.job import parse_command_line

only_0_2 = pytest.mark.requires(torchtitan="0.2")
only_0_3 = pytest.mark.requires(torchtitan="0.3")
pytestmark = pytest.mark.requires(torchtitan="0.")
"""With the flags of a batch, which main does not have."""

MORE = ["--training.seq_len", "256", "--training.max_norm", "inf", "--metrics.enable_tensorboard"]
TP = f"--parallelism.{FLAGS['tp']}"
NEAR = ["layouts", "--world-size", "8", "--near"]

FILE = """\
# ours
[model]
name = "llama3"
flavor = "debugmodel"  # small

[parallelism]
tensor_parallel_degree = 32  # too many
pipeline_parallel_schedule = "1F1B"
"""


def content(arguments: list[str]) -> Any:
    """All that a job says, but for what was read to get it."""
    job = parse_command_line(arguments).to_dict()
    job.get("job", {}).pop("config_file", None)
    return json.loads(re.sub(" at 0x[0-9a-f]+", "", json.dumps(job, default=str)))


def test_arguments_are_the_run_s_own_with_the_degrees_changed(tp_validate: Program) -> None:
    run = [*RUN, TP.replace("_", "-"), "32", *MORE]
    status, out, _ = tp_validate(*NEAR, "--emit", "cli", "--", *run)
    assert (status, shlex.split(out)) == (0, [TP, "8", *RUN, *MORE])
    assert content(shlex.split(out)) == content([*RUN, *MORE, TP, "8"])
    assert tp_validate(*NEAR, "--emit", "cli", "--", *RUN, f"{TP}=32").out == f"{TP} 8 {shlex.join(RUN)}\n"
    # What is left to the ranks stays so.
    assert parse_command_line(shlex.split(out)).parallelism.data_parallel_shard_degree == -1


def test_what_the_layout_needs_of_the_launcher_is_written_too(tp_validate: Program) -> None:
    more = ["--replicate-kv-heads", "--allow", "num001", "--repair"]
    words = [*NEAR, *more, "--emit", "cli", "--", *RUN, TP, "16", *MORE]
    assert tp_validate(*words).out.endswith("--replicate-kv-heads --allow NUM001\n")
    form = "toml" if OLD else "recipe"
    words[words.index("cli")] = form
    first = tp_validate(*words).out.splitlines()[0]
    said = "on 8 ranks, by tp-validate layouts; run by torchtitan_tp_validate.train with "
    assert f"{said}--replicate-kv-heads --allow NUM001" in first


@only_0_2
def test_a_toml_file_keeps_its_comments_and_gets_what_is_changed(
    tp_validate: Program, tmp_path: Path
) -> None:
    file, written = tmp_path / "job.toml", tmp_path / "on_8.toml"
    file.write_text(FILE)
    run = ["--job.config_file", str(file), *MORE]
    words = [*NEAR, "--emit", "toml", "--output-file", str(written), "--", *run]
    assert tp_validate(*words)[:2] == (0, "")
    assert written.read_text() == (
        "# on 8 ranks, by tp-validate layouts\n"
        + FILE.replace("= 32", "= 8")
        + "\n[metrics]\nenable_tensorboard = true\n\n[training]\nseq_len = 256\nmax_norm = inf\n"
    )
    assert content(["--job.config_file", str(written)]) == content([*run, TP, "8"])


@only_0_2
def test_a_run_without_a_file_becomes_one(
    tp_validate: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_fields.py").write_text(
        "from dataclasses import dataclass, field\n\n\n"
        "@dataclass\nclass Training:\n    patience: int = 3\n    until: int | None = None\n\n\n"
        "@dataclass\nclass JobConfig:\n    training: Training = field(default_factory=Training)\n"
    )
    # Its fields are known once it is read.
    run = [*RUN, "--job.custom_config_module", "users_fields", "--training.patience", "5"]
    if "custom_config_module" not in content(RUN)["job"]:
        pytest.skip(f"torchtitan {version('torchtitan')} has no such field")
    written = tmp_path / "on_8.toml"
    out = tp_validate(*NEAR, "--emit", "toml", "--", *run).out
    written.write_text(out)
    assert "patience = 5" in out
    assert "until" not in out
    assert content(["--job.config_file", str(written)]) == content(run)


@only_0_3
def test_a_recipe_is_a_config_function_of_the_run(
    tp_validate: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    words = [*NEAR, "--emit", "recipe", "--output-file", str(tmp_path / "on_8.py"), "--", *RUN, *MORE]
    assert tp_validate(*words, TP, "32")[:2] == (0, "")
    assert (tmp_path / "on_8.py").read_text() == (
        '"""llama3_debugmodel on 8 ranks, by tp-validate layouts."""\n'
        "\n"
        "from dataclasses import replace\n"
        "\n"
        "from torchtitan.models.llama3.config_registry import llama3_debugmodel\n"
        "\n"
        "\n"
        "def llama3_debugmodel_on_8():\n"
        "    config = llama3_debugmodel()\n"
        "    return replace(\n"
        "        config,\n"
        "        metrics=replace(\n"
        "            config.metrics,\n"
        "            enable_tensorboard=True,\n"
        "        ),\n"
        "        training=replace(\n"
        "            config.training,\n"
        "            seq_len=256,\n"
        '            max_norm=float("inf"),\n'
        "            disable_cuda_graphs=True,\n"
        "        ),\n"
        "        parallelism=replace(\n"
        "            config.parallelism,\n"
        "            tensor_parallel_degree=8,\n"
        "        ),\n"
        "    )\n"
    )
    recipe = ["--module", "on_8", "--config", "llama3_debugmodel_on_8"]
    assert content(recipe) == content([*RUN, *MORE, TP, "8"])
    # It is a run like any other, which a search can start from.
    assert tp_validate("layouts", "--world-size", "4", "--emit", "recipe", "--", *recipe)[:2][0] == 0


@only_0_3
def test_a_choice_of_the_command_line_that_is_no_value_is_left_to_it(tp_validate: Program) -> None:
    run = [*RUN, "activation-checkpoint:full"]
    status, out, err = tp_validate(*NEAR, "--emit", "recipe", "--", *run)
    assert (status, out) == (2, "")
    said = "what the command line makes of activation_checkpoint cannot be written down; use --emit cli."
    assert f"tp-validate: {said}\n" in err
    out = tp_validate(
        *NEAR,
        "--emit",
        "cli",
        "--",
        *run,
    ).out
    assert content(shlex.split(out)) == content(run)
    # What follows such a choice is about it alone.
    out = tp_validate(*NEAR, "--emit", "cli", "--", *RUN, TP, "32", run[-1]).out
    assert content(shlex.split(out)) == content([*RUN, TP, "8", run[-1]])


@only_0_3
@pytest.mark.parametrize("module", ["llama3", "gpt_oss", "deepseek_v3", "qwen3"])
def test_what_a_config_builds_anew_is_no_change(module: str) -> None:
    for build in registry.configs(module).values():
        try:
            (before, _), (after, _) = build_for_its_hardware(build), build_for_its_hardware(build)
        except ImportError:
            continue  # torchao
        assert list(_changes(before, after)) == []
        after.parallelism.tensor_parallel_degree += 1
        (change,) = _changes(before, after)
        assert change == (("parallelism", FLAGS["tp"]), after.parallelism.tensor_parallel_degree)


@only_0_3
def test_a_change_inside_a_list_is_told() -> None:
    (before, _), (after, _) = (build_for_its_hardware(registry.configs("llama3")["llama3_8b"]) for _ in "12")
    after.optimizer.param_groups[0].optimizer_kwargs["lr"] = 1.0
    with pytest.raises(UsageError, match=r"makes of optimizer\.param_groups\.0\.optimizer_kwargs cannot"):
        list(_changes(before, after))


def test_a_form_that_the_installed_release_does_not_read_is_refused(tp_validate: Program) -> None:
    form, what, other = (
        ("recipe", "has no config functions", "toml") if OLD else ("toml", "reads no TOML files", "recipe")
    )
    status, out, err = tp_validate(*NEAR, "--emit", form, "--", *RUN)
    said = f"--emit {form}: torchtitan {version('torchtitan')} {what}; choose {other} or cli."
    assert (status, out, err) == (2, "", f"tp-validate: {said}\n")


def test_where_no_layout_works_nothing_is_written(tp_validate: Program, tmp_path: Path) -> None:
    run = [*RUN, "--parallelism.pipeline_parallel_schedule", "1F1B", "--training.local_batch_size", "1"]
    words = ["layouts", "--world-size", "2", "--keep", "pp", "--emit", "cli"]
    words += ["--output-file", str(tmp_path / "run.txt"), "--", *run]
    status, out, err = tp_validate(*words, "--parallelism.pipeline_parallel_degree", "2")
    assert (status, out) == (1, "")
    assert err.endswith(
        "tp-validate: no layout works, so that there is nothing to write; without --emit the rules that "
        "exclude them are counted.\n"
    )
    assert not (tmp_path / "run.txt").exists()
