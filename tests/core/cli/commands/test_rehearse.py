"""``rehearse``: how it speaks of what was seen; the rehearsals themselves are in tests/torchrun."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.core.cli.conftest import Program
from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal import rehearse
from torchtitan_tp_validate.rehearsal.findings import Difference, Rehearsal

RUN = ("--", "--module", "llama3", "--config", "llama3_8b")
EQUAL = Rehearsal(
    *("llama3 8B", "equal", "fits", {"tp": 2, "dp_shard": 2}, ("dp_shard 64 -> 2",), (2, 1)),
    worst=2.5e-7,
    compared=40,
    stand_ins=("flex attention",),
)
RESUMED = replace(EQUAL, cuts=(), stand_ins=(), resumed=True)
GATE = "layers.0.moe.router.gate.weight"
DIFFERS = Rehearsal(
    *("qwen3 30B-A3B", "differs", "fits", {"tp": 2}, (), (2, 1)),
    worst=math.inf,
    compared=40,
    differences=(
        Difference("gradient", GATE, 2, 1, 0.5, 0.5, "not summed over TP ranks", "Replicate()", "issue #1"),
        Difference("gradient", GATE, 1, 1, 0.5, 0.5, "not summed over TP ranks", "Replicate()"),
        Difference("copies", GATE, 2, 2, math.inf),
        Difference("loss", "", 2, 2, 0.1, 1.1),
        Difference("trainable", "norm.weight", 2, 1, math.inf),
    ),
    output="layers.0.moe",
)
END = {"rank": 0, "how": "raised", "stage": "forward or backward of step 1", "error": "ValueError: no\nmore"}
DIES = Rehearsal(
    *(
        "llama3 8B",
        "dies",
        "Tensor parallel degree (3) must divide n_heads (32).\nmore",
        {"tp": 3},
        (),
        (2, 1),
    ),
    worst=math.nan,
    compared=0,
    ends=({**END, "traceback": "File x\nValueError: no"}, {**END, "rank": 1, "traceback": ""}),
)
HANGS = Rehearsal(
    *("llama3 8B", "hangs", "fits", {}, (), (2, 1)),
    worst=math.nan,
    compared=0,
    ends=({**END, "how": "hung", "error": "", "traceback": "File y, in all_reduce"},),
)


def says(monkeypatch: pytest.MonkeyPatch, seen: Rehearsal) -> list[Any]:
    asked: list[Any] = []
    monkeypatch.setattr(rehearse, "rehearse", lambda *args, **how: asked.append((args, how)) or seen)
    return asked


@pytest.mark.parametrize(
    ("seen", "status", "text"),
    [
        (
            EQUAL,
            0,
            "llama3 8B at tp 2, dp_shard 2: equal to one process\n"
            "  loss, gradient norm, 40 gradients and all copies over two steps, at local batch sizes 2 and "
            "1; worst relative difference 2.5e-07\n"
            "  by the rules: fits\n"
            "  smaller than in the run: dp_shard 64 -> 2\n"
            "  not the run's own: flex attention\n",
        ),
        (
            RESUMED,
            0,
            "llama3 8B at tp 2, dp_shard 2: equal to one process\n"
            "  loss, gradient norm, 40 gradients and all copies over two steps, at local batch sizes 2 and "
            "1, and over one more resumed from a checkpoint; worst relative difference 2.5e-07\n"
            "  by the rules: fits\n",
        ),
        (
            DIFFERS,
            1,
            "qwen3 30B-A3B at tp 2: differs from one process\n"
            "  the first wrong output of the forward pass is that of layers.0.moe\n"
            f"  gradient of {GATE} is 0.500 times that of one process: not summed over TP ranks (step 1, "
            "local batch size 2; off by 5.0e-01)\n"
            f"  the copies of {GATE} on several ranks are not equal after step 2, local batch size 2\n"
            "  loss is 1.100 times that of one process (step 2, local batch size 2; off by 1.0e-01)\n"
            "  known: issue #1\n"
            "  and 1 more\n"
            "  by the rules: fits\n",
        ),
        (
            DIES,
            1,
            "llama3 8B at tp 3: dies\n"
            "  rank 0 and 1 more, forward or backward of step 1: ValueError: no\n"
            "    File x\n"
            "    ValueError: no\n"
            "  by the rules: Tensor parallel degree (3) must divide n_heads (32).\n",
        ),
        (
            HANGS,
            1,
            "llama3 8B at one rank: hangs\n"
            "  rank 0, forward or backward of step 1\n"
            "    File y, in all_reduce\n"
            "  by the rules: fits\n",
        ),
    ],
)
def test_what_was_seen_is_told_first_things_first(
    tp_validate: Program, monkeypatch: pytest.MonkeyPatch, seen: Rehearsal, status: int, text: str
) -> None:
    says(monkeypatch, seen)
    assert tp_validate("rehearse", *RUN) == (status, text, "")


@pytest.mark.parametrize("seen", [EQUAL, RESUMED, DIFFERS, DIES, HANGS])
def test_the_json_is_as_its_schema_says(
    tp_validate: Program, monkeypatch: pytest.MonkeyPatch, seen: Rehearsal
) -> None:
    says(monkeypatch, seen)
    document = json.loads(
        tp_validate("rehearse", "--output-format", "json", *RUN).out, parse_constant=pytest.fail
    )
    schema = resources.files("torchtitan_tp_validate.cli").joinpath("schema-rehearse.json").read_text()
    jsonschema.validate(document, json.loads(schema))
    assert document["rehearsals"][0]["outcome"] == seen.outcome


def test_a_run_or_a_model_with_its_degrees_is_rehearsed(
    tp_validate: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = says(monkeypatch, EQUAL)
    tp_validate("rehearse", "--ranks", "8", "--replicate-kv-heads", "--compile", "--keep", "kept", *RUN)
    tp_validate(
        "rehearse", "--model", "qwen3_5", "--flavor", "2B", "--tp", "2", "--dp-shard", "4", "--pp", "2"
    )
    for _, how in asked:
        how.pop("progress")("nobody looks")
    common = {
        "patience": None,
        "replicate_kv_heads": False,
        "ranks": 4,
        "compile": False,
        "repair": False,
        "keep": None,
    }
    named = {"model": "qwen3_5", "flavor": "2B"}
    degrees = {
        "tensor_parallel_degree": 2,
        "data_parallel_shard_degree": 4,
        "pipeline_parallel_degree": 2,
    }
    nothing = {"model": "", "flavor": "", "degrees": {}}
    assert asked == [
        (
            (list(RUN[1:]),),
            {
                **common,
                **nothing,
                "ranks": 8,
                "replicate_kv_heads": True,
                "compile": True,
                "repair": False,
                "keep": Path("kept"),
            },
        ),
        (((),), {**common, **named, "degrees": degrees}),
    ]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "name one thing to rehearse: -- and torchtitan's arguments, or --model"),
        (
            ("--model", "llama3", *RUN),
            "name one thing to rehearse: -- and torchtitan's arguments, or --model",
        ),
        (("--tp", "2", *RUN), "the run has its own model and degrees: give them after --"),
        (("--model", "llama3"), "--flavor is missing: which flavor of the model?"),
    ],
)
def test_anything_else_is_bad_usage(tp_validate: Program, words: tuple[str, ...], problem: str) -> None:
    status, out, err = tp_validate("rehearse", *words)
    assert (status, out, err.splitlines()[0]) == (2, "", f"tp-validate rehearse: {problem}")


def test_what_cannot_be_rehearsed_says_why(tp_validate: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: Any, **__: Any) -> Rehearsal:
        raise RehearsalError("torchtitan does not take the job", "1 error\n::error::no\x1b[2J such flag")

    monkeypatch.setattr(rehearse, "rehearse", cannot)
    message = "tp-validate: torchtitan does not take the job.\n1 error\n\\x3a:error::no\\x1b[2J such flag\n"
    assert tp_validate("rehearse", *RUN) == (2, "", message)
