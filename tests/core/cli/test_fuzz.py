"""Whatever is thrown at the command line: no traceback, and an exit status that means what it says."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchtitan_tp_validate.cli import main
from torchtitan_tp_validate.cli.formats import FORMATS
from torchtitan_tp_validate.releases.huggingface import Framework

FUZZ = settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

COUNTS = st.one_of(
    st.integers(1, 128),
    st.integers(1, 128),
    st.sampled_from([0, -1, 10**7, 10**30, None, True, 2.0, float("nan"), "8", [], {}]),
    st.lists(st.integers(0, 64), max_size=6),
)
LAYER_TYPES = st.one_of(
    st.lists(
        st.sampled_from(["full_attention", "linear_attention", "sliding_attention", "mamba"]), max_size=6
    ),
    st.sampled_from(["M*E-", "", 7, None, [None], ["warp"]]),
)
NAMES = (
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "n_head",
    "num_kv_heads",
    "n_head_kv",
    "num_attention_groups",
    "n_shared_head",
    "hybrid_layer_pattern",
    "vocab_size",
    "intermediate_size",
    "num_key_value_heads_per_layer",
    "kv_lora_rank",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "swa_num_key_value_heads",
    "num_global_key_value_heads",
    "full_attention_interval",
    "attn_layer_period",
    "multi_query",
)
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def objects(inner: Any) -> Any:
    return st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(NAMES, COUNTS),
            "model_type": st.one_of(st.sampled_from(["llama", "mamba2", "kimi_k25", "qwen3_5", ""]), JUNK),
            "layer_types": LAYER_TYPES,
            "text_config": inner,
            "per_layer_config": st.one_of(
                JUNK, st.dictionaries(st.integers(0, 4).map(str), inner, max_size=2)
            ),
            "attn_config": inner,
            "linear_attn_config": st.one_of(
                JUNK, st.just({"full_attn_layers": [[1], 2]}), st.just({"full_attn_layers": "abc"})
            ),
            "block_configs": st.one_of(JUNK, st.just([{"attention": {"n_heads_in_group": 4}}])),
            "vision_config": st.one_of(JUNK, st.fixed_dictionaries({"num_heads": COUNTS})),
        },
    )


# Most have the two numbers that matter, so that many verdicts are real ones.
PLAUSIBLE = st.builds(
    lambda heads, layers, more: {"num_attention_heads": heads, "num_hidden_layers": layers, **more},
    st.integers(1, 128),
    st.integers(1, 6),
    objects(JUNK),
)
CONTENTS = st.one_of(
    PLAUSIBLE.map(lambda value: json.dumps(value).encode()),
    objects(objects(JUNK)).map(lambda value: json.dumps(value).encode()),
    JUNK.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=60),
    PLAUSIBLE.map(lambda value: json.dumps(value).encode()[:-7]),
    PLAUSIBLE.map(lambda value: b"\xef\xbb\xbf" + json.dumps(value).encode()),
    PLAUSIBLE.map(lambda value: json.dumps(value).encode("utf-16")),
    st.sampled_from(
        [
            b"",
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b'{"num_attention_heads": ' + b"9" * 5000 + b"}",
            b'{"text_config": ' * 40 + b"{}" + b"}" * 40,
        ]
    ),
)
DEGREES = st.one_of(
    st.integers(1, 64).map(str),
    st.sampled_from(["1-64", "2,4,8", "1-3,7"]),
    st.sampled_from(["0", "-1", "x", "", "4-2", "1-99999999", "9" * 50, "1,", "\u0663"]),
)
WORDS = st.one_of(
    st.sampled_from(
        [
            *(
                "check",
                "table",
                "audit",
                "rule",
                "rules",
                "rehearse",
                "layouts",
                "doctor",
                "TP002",
                "tp001",
                "EP001",
            ),
            *("--tp", "4", "--hf-config", "--plan", "transformers", "torchtitan", "--ep", "--cp", "--flavor"),
            *("--output-format", *FORMATS, "--output-file", "--", "--version", "-h", "--all", "--world-size"),
        ]
    ),
    st.text(max_size=6),
)
# These ask the installed torchtitan, which is slow to import, and no part of what is fuzzed here.
ASKS_TORCHTITAN = {"table", "audit", "layouts", "rehearse", "doctor", "--", "--model"}


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a call in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@FUZZ
@given(CONTENTS, DEGREES, st.sampled_from(list(FORMATS)), st.sampled_from([f.value for f in Framework]))
def test_any_file_gets_a_verdict_or_a_reason(
    folder: Path, content: bytes, tp: str, output_format: str, plan: str
) -> None:
    file = folder / "config.json"
    file.write_bytes(content)
    common = ("check", "--hf-config", str(file), "--tp", tp, "--plan", plan)
    status, out, err = run(*common, "--output-format", output_format)
    assert "Traceback" not in out + err
    document_status, document, complaint = run(*common, "--output-format", "json")
    assert status == document_status
    if complaint:  # bad usage
        assert (status, document) == (2, "")
        assert "--tp" in complaint
        return
    (result,) = json.loads(document)["results"]
    assert status == {"compatible": 0, "incompatible": 1, "not_validated": 2}[result["status"]]
    judged = [judgement["compatible"] for judgement in result["judgements"]]
    if status == 2:
        assert result["reason"]
        assert not judged
        return
    sizes = [dim["size"] for dim in result["dims"]]
    asked = [judgement["degrees"]["tp"] for judgement in result["judgements"]]
    assert judged == [all(size % degree == 0 for size in sizes) for degree in asked]
    assert status == (0 if all(judged) else 1)


@FUZZ
@given(st.lists(WORDS, max_size=6))
def test_any_words_end_in_a_result_or_in_usage(folder: Path, words: list[str]) -> None:
    if ASKS_TORCHTITAN & set(words):
        return
    before = Path.cwd()
    os.chdir(folder)
    try:
        status, out, err = run(*words)
    finally:
        os.chdir(before)
    assert "Traceback" not in out + err
    assert status in (0, 1, 2)
    if status == 2 and "--hf-config" not in words:
        assert out == ""
        assert err.startswith("tp-validate")
    if status == 0:
        assert err == ""
