"""Which tp_plan a file is judged by, in releases that need not be installed, and how the table is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from torchtitan_tp_validate.cli import main
from torchtitan_tp_validate.releases import transformers_plans
from torchtitan_tp_validate.releases.transformers_plans import FILE, decode, load, plan_at, split_by
from torchtitan_tp_validate.transformers_tp.plan_table import ReleasePlans, with_release


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the version that is taken to be installed; none to begin with."""

    def install(version: str | None) -> None:
        monkeypatch.setattr(transformers_plans, "transformers_version", lambda: version)

    install(None)
    return install


def config(model_type: str, n_heads: int, n_kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "num_hidden_layers": 2,
        **more,
    }


PHI4 = config("phi3", 40, 10, architectures=["Phi3ForCausalLM"])
OLMO2 = config("olmo2", 40, 8, architectures=["Olmo2ForCausalLM"])
DEEPSEEK_V3 = config("deepseek_v3", 128, 128, kv_lora_rank=512, architectures=["DeepseekV3ForCausalLM"])
DEEPSEEK_V2 = config("deepseek_v2", 128, 128, kv_lora_rank=512, architectures=["DeepseekV2ForCausalLM"])
LLAMA = config("llama", 32, 8, architectures=["LlamaForCausalLM"])
GPT_OSS = config("gpt_oss", 64, 8, architectures=["GptOssForCausalLM"])
GPT2 = {"model_type": "gpt2", "n_head": 12, "n_layer": 12, "architectures": ["GPT2LMHeadModel"]}
JAMBA = config("jamba", 32, 8, attn_layer_period=2, attn_layer_offset=1)


def verdicts(content: dict[str, Any], tp: int, folder: Path) -> set[str]:
    """What the function and the command say of one degree: one verdict, when they agree."""
    try:
        tpv.validate_tp_compat(content, tp)
        by_function = "fits"
    except tpv.TPCompatError:
        by_function = "does not fit"
    except tpv.PlanError:
        by_function = "not validated"
    file = folder / "config.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    status = main(["check", "--hf-config", str(file), "--plan", "transformers", "--tp", str(tp)])
    return {by_function, {0: "fits", 1: "does not fit", 2: "not validated"}[status]}


@pytest.mark.parametrize(
    ("content", "tp", "verdict"),
    [
        (PHI4, 4, "fits"),  # 10 key-value heads, gathered
        (PHI4, 3, "fits"),
        (OLMO2, 16, "fits"),
        (DEEPSEEK_V3, 3, "fits"),  # its attention is whole on every rank
        (JAMBA, 64, "fits"),
        (GPT_OSS, 16, "fits"),  # its output head is sharded, and nothing else
        (config("minimax_m2", 48, 8), 16, "fits"),
        (config("granitemoe", 24, 8), 16, "fits"),
        (config("phimoe", 32, 8), 16, "fits"),
        (LLAMA, 8, "fits"),
        (LLAMA, 16, "does not fit"),
        (DEEPSEEK_V2, 64, "fits"),  # latent attention: by query heads alone
        (DEEPSEEK_V2, 3, "does not fit"),
        (GPT2, 2, "not validated"),
        (config("bert", 12, 12), 2, "not validated"),
        (config("no_such_model", 12, 12), 2, "not validated"),
        (
            {"model_type": "qwen2_vl", **{k: v for k, v in LLAMA.items() if k.startswith("num_")}},
            16,
            "does not fit",
        ),
        ({"model_type": "llava", "text_config": PHI4}, 4, "fits"),
        ({"model_type": "llava", "text_config": LLAMA}, 16, "does not fit"),
        (
            {"model_type": "llava", "text_config": config("opt", 32, 32)},
            2,
            "fits",
        ),  # the class shards its head
        ({"model_type": "kimi_k25", "text_config": {**DEEPSEEK_V3, "model_type": "kimi_k2"}}, 3, "fits"),
    ],
)
def test_the_plan_of_the_newest_release_decides_in_both_doors(
    content: dict[str, Any], tp: int, verdict: str, tmp_path: Path
) -> None:
    assert verdicts(content, tp, tmp_path) == {verdict}


def refusal(content: dict[str, Any]) -> str:
    with pytest.raises(tpv.PlanError) as caught:
        tpv.validate_tp_compat(content, 2)
    return str(caught.value)


def test_a_model_without_a_plan_is_told_what_its_release_does_with_it(installed: Any) -> None:
    assert refusal(GPT2) == (
        "Not validated: transformers 5.24 has no tensor parallel plan for gpt2: it refuses to load it with a "
        "tp_size above 1 unless DistributedConfig(tp_plan={...}) brings one."
    )
    installed("5.14.1")
    assert refusal(GPT2) == (
        "Not validated: transformers 5.14 has no tensor parallel plan for gpt2: it loads with any tp_size, "
        "and every rank holds all of it."
    )


def test_a_class_may_have_a_plan_where_its_decoder_has_none_and_5_14_is_the_first_to_follow_it(
    installed: Any,
) -> None:
    unnamed = {name: value for name, value in GPT_OSS.items() if name != "architectures"}
    classifier = {**GPT_OSS, "architectures": ["GptOssForSequenceClassification"]}
    installed("5.14.1")
    tpv.validate_tp_compat(GPT_OSS, 16)
    tpv.validate_tp_compat(unnamed, 16)
    tpv.validate_tp_compat({**GPT_OSS, "architectures": "none"}, 16)
    assert "has no tensor parallel plan for gpt_oss" in refusal(classifier)
    installed("5.13.1")
    for content in (GPT_OSS, unnamed, classifier):
        assert "has no tensor parallel plan for gpt_oss" in refusal(content)


def test_the_installed_release_decides(installed: Any) -> None:
    installed("5.4.0")
    assert refusal(config("muse_glimmer_text", 32, 8)) == (
        "Not validated: transformers 5.4 does not know the model_type 'muse_glimmer_text'; 5.15 is the first "
        "release that does."
    )
    installed("5.1.0")
    assert refusal(config("no_such_model", 32, 8)).startswith("Not validated: transformers 5.2 does not know")


def test_a_release_that_is_not_in_the_table_is_judged_by_the_one_before_and_the_verdict_says_so(
    installed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed("6.1.0.dev0")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PHI4), encoding="utf-8")
    assert main(["check", "--hf-config", str(file), "--plan", "transformers", "--tp", "4"]) == 0
    assert capsys.readouterr().out == (
        f"{file}: TP 4 fits phi3 by transformers' rule. Not validated: the plans of transformers 6.1, which "
        "is installed (those of 5.24 were taken).\n"
    )


def test_remote_code_is_not_known_unless_its_config_brings_a_plan() -> None:
    content = config("no_such_model", 32, 8)
    assert refusal(content) == (
        "Not validated: transformers 5.24 does not know the model_type 'no_such_model', so that its plan is "
        "unknown: a base_model_tp_plan in the config would tell it."
    )
    plan = {"layers.*.self_attn.q_proj": "colwise", "layers.*.self_attn.k_proj": "colwise"}
    assert tpv.valid_tp_degrees({**content, "base_model_tp_plan": plan}) == [1, 2, 4, 8]
    for broken in ([1], {"layers.*.self_attn.q_proj": 1}):
        assert refusal({**content, "base_model_tp_plan": broken}) == (
            f"Not validated: base_model_tp_plan must map modules to parallel styles, got {broken}."
        )


@pytest.mark.parametrize("named", [None, 7, ["llama"], {}])
def test_without_a_model_type_there_is_no_plan(named: Any) -> None:
    told = (
        "the config has no model_type, by which transformers finds a tensor parallel plan."
        if named is None
        else f"transformers 5.24 does not know the model_type {named}, so that its plan is unknown: a "
        "base_model_tp_plan in the config would tell it."
    )
    assert refusal({**LLAMA, "model_type": named}) == f"Not validated: {told}"


def test_where_no_head_is_cut_every_degree_up_to_the_query_heads_is_listed() -> None:
    assert tpv.valid_tp_degrees(PHI4) == list(range(1, 41))


def test_what_is_cut_beside_the_text_decoder_is_judged_and_named() -> None:
    vision = config("llama4_vision_model", 12, 12)
    llama4 = {"model_type": "llama4", "text_config": config("llama4_text", 40, 8), "vision_config": vision}
    assert tpv.valid_tp_degrees(llama4) == [1, 2, 4]
    with pytest.raises(tpv.TPCompatError) as caught:
        tpv.validate_tp_compat(llama4, 8)
    [query, key_value] = caught.value.violations
    assert (query.dim, query.size, query.where) == ("vision_config.num_attention_heads", 12, "vision_config")
    assert key_value.dim == "vision_config.num_key_value_heads"
    assert query.consequence.startswith("the model loads without a word, and its first forward pass dies")
    of_the_whole = {"audio_config": config("llama4", 3, 3), **llama4}
    assert tpv.valid_tp_degrees(of_the_whole) == [1, 2, 4]
    siglip = {**llama4, "vision_config": config("siglip_vision_model", 12, 12)}
    assert tpv.valid_tp_degrees(siglip) == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("rule", "split"),
    [
        ("layers.*.self_attn.q_proj", {"TP001"}),
        ("model.layers.0.self_attn.k_proj.weight", {"TP002"}),
        ("encoder.layers.*.self_attn.v_proj.linear", {"TP002"}),
        ("layers.*.self_attn.*.q_b_proj", {"TP001"}),
        ("layers.*.attention.query_key_value", {"TP001", "TP002"}),
        ("layers.*.linear_attn.q_proj", set()),
        ("layers.*.mlp.gate_proj", set()),
        ("lm_head", set()),
    ],
)
def test_heads_are_cut_where_a_projection_of_attention_is_colwise(rule: str, split: set[str]) -> None:
    assert split_by({rule: "colwise"}) == split
    for other in ("colwise_gather_output", "packed_colwise", "rowwise", "replicate"):
        assert split_by({rule: other}) == set()


# What attention has beside its projections of heads.
NOT_OF_HEADS_ALONE = {"gate_proj", "g_proj", "gate_bias", "sinks", "q_a_proj", "weights_proj", "o_proj"}


def test_every_colwise_rule_of_attention_in_the_table_is_understood() -> None:
    table = load()
    rules = {
        pattern
        for changes in (*table.model_types.values(), *table.classes.values())
        for _, plan in changes
        for pattern, style in (plan or {}).items()
        if style == "colwise" and ("attn" in pattern or "attention" in pattern)
    }
    assert len(rules) > 10
    not_understood = {rule for rule in rules if not split_by({rule: "colwise"})}
    assert {rule.rpartition(".")[2] for rule in not_understood} <= NOT_OF_HEADS_ALONE


def test_the_table_has_every_release_of_5_from_the_guards_first_to_its_last() -> None:
    from torchtitan_tp_validate.transformers_tp.guard import FIRST_RELEASE, LAST_RELEASE

    releases = load().releases
    assert releases == tuple((5, minor) for minor in range(releases[0][1], releases[-1][1] + 1))
    assert releases[0] == FIRST_RELEASE
    assert releases[-1] >= LAST_RELEASE


def test_writing_a_release_leaves_the_others_as_they_are() -> None:
    old, new = {"layers.*.self_attn.q_proj": "colwise"}, {"layers.*.self_attn.q_proj": "colwise_rep"}
    text = with_release(None, ReleasePlans((5, 10), {"a": old, "b": {}, "gone": {}}, {"a/AForCausalLM": new}))
    text = with_release(json.loads(text), ReleasePlans((5, 2), {"a": old, "gone": old}, {}))
    text = with_release(json.loads(text), ReleasePlans((5, 11), {"a": new, "b": {}}, {}))
    table = decode(json.loads(text))
    assert table.releases == ((5, 2), (5, 10), (5, 11))
    at = [{name: plan_at(changes, i) for name, changes in table.model_types.items()} for i in range(3)]
    assert at == [
        {"a": old, "b": None, "gone": old},
        {"a": old, "b": {}, "gone": {}},
        {"a": new, "b": {}, "gone": None},
    ]
    assert [plan_at(table.classes["a/AForCausalLM"], i) for i in range(3)] == [None, new, None]
    again = with_release(json.loads(text), ReleasePlans((5, 11), {"a": new, "b": {}}, {}))
    assert again == text
    assert text.count("colwise_rep") == 1


def test_the_shipped_file_is_as_the_script_writes_it() -> None:
    text = FILE.read_text(encoding="utf-8")
    table = load()
    last = len(table.releases) - 1
    parts = [
        {name: plan for name, of in names.items() if (plan := plan_at(of, last)) is not None}
        for names in (table.model_types, table.classes)
    ]
    assert with_release(json.loads(text), ReleasePlans(table.releases[last], *parts)) == text


def test_neither_torch_nor_transformers_is_loaded_for_it(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA), encoding="utf-8")
    code = (
        "import sys; from torchtitan_tp_validate.cli import main; "
        f"status = main(['check', '--hf-config', {str(file)!r}, '--tp', '16', '--plan', 'transformers']); "
        "heavy = {'torch', 'torchtitan', 'transformers'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else status)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 1


def test_a_tower_that_a_file_gives_the_type_of_the_whole_is_not_taken_for_the_whole() -> None:
    tower = {"model_type": "qwen3_5_moe", "depth": 27, "num_heads": 16}
    text = {
        "model_type": "qwen3_5_moe_text",
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    }
    content = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": tower}
    assert tpv.valid_tp_degrees(content) == [1, 2]


def test_an_object_is_asked_for_its_own_plan(installed: Any) -> None:
    colwise = {"layers.*.self_attn.q_proj": "colwise"}
    content: dict[str, Any] = {"model_type": "of_someone"}

    def found(**fields: Any) -> Any:
        return transformers_plans.find_tp_plan(SimpleNamespace(**fields), content, [content])

    assert found(tp_plan=colwise) == (colwise, ())
    brings = SimpleNamespace(base_model_tp_plan=colwise)
    text_config = {True: brings}.__getitem__
    assert found(base_model_tp_plan=None, get_text_config=lambda decoder: text_config(decoder)) == (
        colwise,
        (),
    )
    loads = "it loads with any tp_size, and every rank holds all of it."
    refuses = (
        "it refuses to load it with a tp_size above 1 unless DistributedConfig(tp_plan={...}) brings one."
    )
    for version, consequence in (("5.20.0", loads), ("5.21.0", refuses), (None, refuses)):
        installed(version)
        with pytest.raises(tpv.PlanError) as caught:
            found(tp_plan=None)
        release = "5.24" if version is None else version.removesuffix(".0")
        assert str(caught.value) == (
            f"Not validated: transformers {release} has no tensor parallel plan for of_someone: {consequence}"
        )
    content["model_type"] = None
    with pytest.raises(tpv.PlanError, match="has no tensor parallel plan for this model: it refuses"):
        found(tp_plan=None)
