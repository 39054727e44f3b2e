"""Native tensor parallelism of the transformers at hand: stock, guarded, and with plans completed.

Each case has its stock twin, which shows what the guard or the fix is for, and fails when it is for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

import torchtitan_tp_validate as tpv
from tests.forked import run_torchrun
from tests.transformers.models import FAMILIES as MODELS
from tests.transformers.models import VOCAB
from torchtitan_tp_validate.cli import main
from torchtitan_tp_validate.releases.transformers_plans import release

RELEASE = release(transformers.__version__)
# Up to 5.13.1 the instance's plan wipes its class's; 5.14 keeps it, and the tied weight stays whole.
WIPES_CLASS_PLANS = RELEASE < (5, 14)
SHARDS_EMBEDDINGS = RELEASE >= (5, 15)
FAMILIES = ("llama", "qwen3_5_moe", "qwen2_audio")
HAVE_A_RULE = ("llama", "qwen3_5_moe")
TOLERANCE = 1e-5
TIMEOUT = 300
ROOT = Path(__file__).parents[2]

Reports = dict[str, list[dict[str, Any]]]


def case(family: str, mode: str, label: str, **text: Any) -> dict[str, Any]:
    return {"name": f"{family} {label} {mode}", "family": family, "mode": mode, "text": text}


def tied_or_not() -> Iterator[dict[str, Any]]:
    for family in FAMILIES:
        for label in ("untied", "tied"):
            for mode in ("stock", "fixed"):
                yield case(family, mode, label, tie_word_embeddings=label == "tied")


TWO_RANKS = [
    *tied_or_not(),
    *(case("lfm2", mode, "tied", tie_word_embeddings=True) for mode in ("stock", "fixed")),
    case("llama", "fixed", "uneven", vocab_size=255),
    case("llama", "fixed", "padded", tie_word_embeddings=True, pad_token_id=250),
    *(case(family, "guarded", "fits") for family in FAMILIES),
]
# Two key-value heads on four ranks, which is right where a plan gathers them or leaves them whole.
# 5.4's OLMo 2 config declares an int and defaults to a bool, which huggingface_hub 1.33 refuses to build.
WHOLE_HEADS = ("phi3", "deepseek_v3", *(["olmo2"] if RELEASE >= (5, 5) else []))
FOUR_RANKS = [
    *(case(family, mode, "kv2") for family in FAMILIES for mode in ("guarded", "stock")),
    *(case(family, "guarded", "kv2") for family in WHOLE_HEADS),
]


def run(out: Path, cases: list[dict[str, Any]], nproc: int) -> Reports:
    out.mkdir(exist_ok=True)
    (out / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    arguments = ["--cases", str(out / "cases.json"), "--out", str(out)]
    result = run_torchrun(
        "tests.transformers.worker", arguments, nproc=nproc, timeout=TIMEOUT, out=out, cwd=ROOT
    )
    assert not result.timed_out, result
    assert not result.leftover, result
    assert result.returncode == 0, result
    reports: Reports = {}
    for rank in range(nproc):
        for report in json.loads((out / f"rank{rank}.json").read_text(encoding="utf-8")):
            reports.setdefault(report["case"], []).append(report)
    assert list(map(len, reports.values())) == [nproc] * len(cases), result
    return reports


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return run(tmp_path_factory.mktemp("two"), TWO_RANKS, 2)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return run(tmp_path_factory.mktemp("four"), FOUR_RANKS, 4)


def assert_equals_one_process(report: dict[str, Any]) -> None:
    assert report["stage"] == "done", report
    assert report["width"] == report["expected_width"], report
    assert report["difference"] < TOLERANCE, report
    assert report["same_tokens"] is True, report


@pytest.mark.parametrize("label", ["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_fix_the_output_head_is_a_shard_and_the_logits_are_those_of_one_process(
    two_ranks: Reports, family: str, label: str
) -> None:
    for report in two_ranks[f"{family} {label} fixed"]:
        assert report["head_rows"] == VOCAB // 2, report
        assert_equals_one_process(report)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_fix_an_untied_output_head_is_whole_where_the_release_has_no_effective_rule(
    two_ranks: Reports, family: str
) -> None:
    sharded = family in HAVE_A_RULE and not WIPES_CLASS_PLANS
    for report in two_ranks[f"{family} untied stock"]:
        assert report["head_rows"] == (VOCAB // 2 if sharded else VOCAB), report
        assert_equals_one_process(report)


@pytest.mark.parametrize("family", HAVE_A_RULE)
def test_without_the_fix_tied_logits_are_silently_twice_as_wide_in_5_14_alone(
    two_ranks: Reports, family: str
) -> None:
    for report in two_ranks[f"{family} tied stock"]:
        if not WIPES_CLASS_PLANS and not SHARDS_EMBEDDINGS:
            assert (report["stage"], report["width"]) == ("done", 2 * VOCAB), report
        else:
            assert report["head_rows"] == (VOCAB // 2 if SHARDS_EMBEDDINGS else VOCAB), report
            assert_equals_one_process(report)


def test_a_rule_for_the_head_alone_of_a_tied_pair_is_wrong_until_the_fix_completes_it(
    two_ranks: Reports,
) -> None:
    for report in two_ranks["lfm2 tied stock"]:
        if WIPES_CLASS_PLANS:  # nothing of this model is sharded then, and nothing is fixed
            assert_equals_one_process(report)
        elif SHARDS_EMBEDDINGS:
            assert report["stage"] == "forward", report
            assert "narrow unexpectedly changed concrete size" in report["message"], report
        else:
            assert (report["stage"], report["width"]) == ("done", 2 * VOCAB), report
    for report in two_ranks["lfm2 tied fixed"]:
        assert report["head_rows"] == (VOCAB if WIPES_CLASS_PLANS else VOCAB // 2), report
        assert_equals_one_process(report)


def test_the_fix_leaves_what_the_release_cannot_split_whole_and_right(two_ranks: Reports) -> None:
    for report in two_ranks["llama padded fixed"]:
        assert report["head_rows"] == (VOCAB // 2 if SHARDS_EMBEDDINGS else VOCAB), report
        assert_equals_one_process(report)
    for report in two_ranks["llama uneven fixed"]:
        if not WIPES_CLASS_PLANS and not SHARDS_EMBEDDINGS:  # the rule is upstream's, and so is the refusal
            assert report["error"] == "ValueError", report
            assert "requires out_features to be divisible by the number of ranks" in report["message"]
            continue
        rows = (128, 127) if SHARDS_EMBEDDINGS else (255, 255)
        assert report["head_rows"] == rows[report["rank"]], report
        assert_equals_one_process(report)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_degree_that_fits_is_let_through_and_generates_the_tokens_of_one_process(
    two_ranks: Reports, family: str
) -> None:
    for report in two_ranks[f"{family} fits guarded"]:
        assert_equals_one_process(report)


NAMES = {"llama": "llama", "qwen3_5_moe": "qwen3_5_moe", "qwen2_audio": "qwen2_audio"}
WHERE = {"llama": "all 2 layers", "qwen3_5_moe": "layer 3 (1 of 4)", "qwen2_audio": "all 2 layers"}
FLAG = (
    "tp_size=2, as in from_pretrained(...,\n  distributed_config=DistributedConfig(tp_size=2))"
    if RELEASE >= (5, 15)
    else 'tp_size=2, as in from_pretrained(..., tp_plan="auto", tp_size=2)'
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_degree_that_does_not_divide_the_kv_heads_is_refused_before_a_weight_is_read(
    four_ranks: Reports, family: str
) -> None:
    for report in four_ranks[f"{family} kv2 guarded"]:
        assert (report["stage"], report["error"]) == ("load", "TPCompatError"), report
        assert report["files_opened"] == 0, report
        assert report["message"] == (
            f"Tensor parallel degree (4) must divide num_key_value_heads (2). For {NAMES[family]}, "
            "max supported TP is 2.\n"
            "\n"
            f"  TP002 num_key_value_heads = 2 is not a multiple of 4, in {WHERE[family]}:\n"
            "        wk and wv are split by columns, so that every rank computes whole key-value heads.\n"
            "\n"
            "Without this check: the model loads without a word, and its first forward pass dies in "
            "attention with\n"
            "  \"shape '[...]' is invalid for input of size ...\".\n"
            "Degrees that work: 1, 2.\n"
            f"To change it: {FLAG}"
        ), report


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_guard_it_loads_and_dies_in_its_first_forward_pass(
    four_ranks: Reports, family: str
) -> None:
    for report in four_ranks[f"{family} kv2 stock"]:
        assert report["files_opened"] > 0, report
        assert report["stage"] == "forward", report
        assert "is invalid for input of size" in report["message"], report


@pytest.mark.parametrize("family", WHOLE_HEADS)
def test_heads_that_the_plan_does_not_cut_need_not_divide(
    four_ranks: Reports, family: str, tmp_path: Path
) -> None:
    for report in four_ranks[f"{family} kv2 guarded"]:
        assert_equals_one_process(report)
    _, config = MODELS[family](num_key_value_heads=2)
    content = {**json.loads(config.to_json_string(use_diff=False)), "architectures": []}
    for what in (config, content):
        tpv.validate_tp_compat(what, 4)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    assert main(["check", "--hf-config", str(file), "--plan", "transformers", "--tp", "4"]) == 0
