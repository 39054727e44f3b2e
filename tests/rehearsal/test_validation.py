"""A run that validates: what stops its validator, or its data its model, beside what the rules say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.rehearsal import warm
from tests.torchtitan.installed import RELEASE
from torchtitan_tp_validate import validate_job
from torchtitan_tp_validate.cli.torchtitan import judge_run
from torchtitan_tp_validate.errors import RehearsalError, RunWarning
from torchtitan_tp_validate.job import Options, parse_command_line
from torchtitan_tp_validate.rehearsal.told import whole_text

pytestmark = [
    pytest.mark.requires(torchtitan=("0.2.1", "0.2.2", "0.3.0")),
    pytest.mark.xdist_group("validation"),
]

ALLOWED = ("NUM001", "NUM002", "NUM008", "NUM009", "NUM010")


def of(model: str, flavor: str, *more: str, batch: int = 8, **degrees: int) -> list[str]:
    """The arguments of a run of 0.2.x that validates five batches of eight sequences."""
    words = ["--model.name", model, "--model.flavor", flavor, "--training.local_batch_size", str(batch)]
    for axis, degree in degrees.items():
        words += [f"--parallelism.{axis}_degree", str(degree)]
    return [*words, "--validation.enable", "--validation.steps", "5", *more]


def of_config(module: str, config: str, *more: str) -> list[str]:
    words = ["--module", module, "--config", config, "--training.disable_cuda_graphs", *more]
    return [*words, "--validator.enable", "--validator.steps", "5"]


CP, PP, TP = {"context_parallel": 2}, {"pipeline_parallel": 2}, {"tensor_parallel": 2}
EQUAL = "equal"
RUNS: dict[str, dict[str, tuple[list[str], str, list[str]]]] = {
    "0.2.1": {
        "no masks": (of("llama3", "debugmodel_flex_attn", **TP), "AssertionError", ["VAL002"]),
        "no validator": (of("deepseek_v3", "debugmodel", **TP), "AssertionError", ["VAL002"]),
        "fed alike": (of("llama4", "debugmodel", **TP), EQUAL, []),
    },
    "0.2.2": {
        "masks": (of("llama4", "debugmodel", **TP), "AssertionError", ["VAL002"]),
        "no frequencies": (of("qwen3", "debugmodel_moe", **CP), "freqs_cis", ["VAL002"]),
        "a batch too small": (
            of("llama3", "debugmodel", batch=16, **PP),
            "Expecting 8 arg_mbs but got 7",
            ["VAL003"],
        ),
        "a batch that fits": (of("llama3", "debugmodel", **PP), EQUAL, []),
        "parts counted": (of("llama3", "debugmodel", **CP), "validation loss", []),
        "fed alike": (of("qwen3", "debugmodel_moe", **TP), EQUAL, []),
    },
    "0.3.0": {
        "no special tokens": (
            of_config("qwen3_5", "qwen35_debugmodel"),
            "'NoneType' object is not subscriptable",
            ["VAL002"],
        ),
        "fed alike": (of_config("kimi_k2_7", "kimi_k2_5_debugmodel"), EQUAL, []),
    },
}
"""Release -> run -> its arguments, what comes of it, and the codes of what the rules say."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what came of each run."""
    folder = tmp_path_factory.mktemp("validation")
    requests = {name: {"arguments": run, "repair": True} for name, (run, _, _) in RUNS[RELEASE].items()}
    warm.rehearse_all(requests, folder)
    return folder


def found(out: Path, name: str) -> tuple[str, str]:
    """What came of a run, and what is told of it; where one process stops as well, it cannot be rehearsed."""
    try:
        seen = warm.found(out, name)
    except RehearsalError as error:
        return "dies", str(error)
    assert seen.validated
    return seen.outcome, whole_text(seen)


def codes(arguments: list[str]) -> list[str]:
    (judgement,) = judge_run(arguments, Options(world_size=4, allow=ALLOWED)).judgements
    return [problem.code for problem in judgement.error.problems] if judgement.error else []


@pytest.mark.parametrize(
    ("release", "name"),
    [
        pytest.param(release, name, marks=pytest.mark.requires(torchtitan=release))
        for release, runs in RUNS.items()
        for name in runs
    ],
)
def test_a_validation_comes_out_as_the_rules_say(out: Path, release: str, name: str) -> None:
    arguments, wanted, said = RUNS[release][name]
    outcome, told = found(out, name)
    assert (outcome == EQUAL) == (wanted == EQUAL), told
    assert wanted == EQUAL or wanted in told
    assert codes(arguments) == said


@pytest.mark.requires(torchtitan="0.2.2")
def test_a_validation_loss_that_is_logged_too_large_is_warned_of() -> None:
    arguments, *_ = RUNS["0.2.2"]["parts counted"]
    told = r"^VAL004 the validation loss is multiplied by context_parallel_degree \(2\)"
    with pytest.warns(RunWarning, match=told):
        validate_job(parse_command_line(arguments), world_size=4, allow=ALLOWED)


@pytest.mark.requires(torchtitan="0.3.0")
def test_a_loader_is_one_that_the_model_and_the_validator_can_take() -> None:
    from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader

    from tests.torchtitan.test_runs import codes as codes_of

    def job(module: str, config: str) -> Any:
        return parse_command_line(of_config(module, config))

    with_images = job("kimi_k2_7", "kimi_k2_5_debugmodel")
    assert codes_of(with_images) == []
    with_images.validator.dataloader = with_images.dataloader
    assert codes_of(with_images) == ["VAL002"]
    of_text = job("qwen3_5", "qwen35_debugmodel")
    of_text.validator.enable = False
    assert codes_of(of_text) == []
    of_text.dataloader = HuggingFaceTextDataLoader.Config(dataset="c4")
    assert codes_of(of_text) == ["DATA001"]
