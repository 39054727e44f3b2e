"""The audit and the fix on real classes, made on the meta device. No torchrun, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import torchtitan_tp_validate as tpv
from tests.transformers.models import EIGHT_OF_5_23, FAMILIES, VOCAB
from tests.transformers.test_native_tp import RELEASE, SHARDS_EMBEDDINGS, WIPES_CLASS_PLANS
from torchtitan_tp_validate.cli import main
from torchtitan_tp_validate.transformers_tp import audit_tp_plan, ensure_lm_head_plan
from torchtitan_tp_validate.transformers_tp.audit import NotAudited, audit_installed, audited_classes


def tiny(family: str, **text: Any) -> Any:
    defaults = {"vocab_size": VOCAB, "num_key_value_heads": 2, "tie_word_embeddings": False}
    cls, config = FAMILIES[family](**{**defaults, **text})
    with torch.device("meta"):
        return cls(config)


@pytest.mark.parametrize("family", ["llama", "qwen3_5_moe"])
def test_the_instance_is_judged_not_its_class(family: str) -> None:
    model = tiny(family)
    audit = audit_tp_plan(model)
    assert audit.head is not None
    assert audit.head.shape == (VOCAB, 64)
    assert audit.head.bytes_per_rank == VOCAB * 64 * 4
    assert audit.head.rule == (None if WIPES_CLASS_PLANS else "colwise_gather_output")
    assert audit.head_left_whole is WIPES_CLASS_PLANS
    assert not audit.fails
    if RELEASE >= (5, 5):  # the class has said so all along
        assert type(model)._tp_plan == {"lm_head": "colwise_gather_output"}


def test_ties_are_seen_and_what_they_lead_to() -> None:
    head = audit_tp_plan(tiny("llama", tie_word_embeddings=True)).head
    assert head is not None
    assert head.tied_to == ("model.embed_tokens",)
    if SHARDS_EMBEDDINGS:
        assert (head.embedding_rule, head.consequence) == ("embedding_rowwise", "")
    elif WIPES_CLASS_PLANS:
        assert (head.rule, head.consequence) == (None, "tied; every rank holds all of it")
    else:
        assert head.consequence.startswith("tied to a whole embedding: logits tp times too wide")
    assert audit_tp_plan(tiny("llama", tie_word_embeddings=True)).fails is (
        not SHARDS_EMBEDDINGS and not WIPES_CLASS_PLANS
    )


def test_large_linears_that_the_plan_leaves_whole_are_listed() -> None:
    [vision] = [x for x in audit_tp_plan(tiny("qwen3_5_moe")).linears if x.name.endswith(".qkv")]
    assert vision.name == "model.visual.blocks.*.attn.qkv"
    assert (vision.count, vision.shape, vision.bytes_per_rank) == (1, (96, 32), 96 * 32 * 4)
    assert audit_tp_plan(tiny("llama")).linears == ()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3_5_moe", "qwen2_audio"])
def test_a_completed_plan_has_both_rules_and_undo_takes_back_what_was_added(family: str, tied: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    before = dict(model._tp_plan)
    fix = ensure_lm_head_plan(model)
    audit = audit_tp_plan(model)
    assert not audit.head_left_whole
    assert not audit.fails
    assert {**before, **fix.rules} == model._tp_plan
    assert ensure_lm_head_plan(model).rules == {}
    fix.undo()
    fix.undo()
    assert model._tp_plan == before


def test_where_upstream_is_right_nothing_is_added() -> None:
    model = tiny("llama", tie_word_embeddings=SHARDS_EMBEDDINGS)
    expected = {"lm_head": "colwise_gather_output"} if WIPES_CLASS_PLANS else {}
    assert ensure_lm_head_plan(model).rules == expected


def test_a_model_without_a_plan_is_left_alone() -> None:
    model = tiny("llama")
    model._tp_plan = {}
    assert ensure_lm_head_plan(model).rules == {}
    assert not audit_tp_plan(model).head_left_whole


def test_a_distributed_model_is_refused() -> None:
    model = tiny("llama")
    model._device_mesh = object()
    with pytest.raises(
        tpv.PlanError, match="is distributed already: a rule for its output head must be there"
    ):
        ensure_lm_head_plan(model)


def test_a_class_is_fixed_until_it_is_undone_and_somebody_elses_later_patch_stays() -> None:
    cls, _ = FAMILIES["qwen2_audio"]()
    original = PreTrainedModel.post_init
    with ensure_lm_head_plan(cls):
        assert not audit_tp_plan(tiny("qwen2_audio")).head_left_whole
        assert audit_tp_plan(tiny("llama")).head_left_whole is WIPES_CLASS_PLANS
    assert "post_init" not in vars(cls)
    assert audit_tp_plan(tiny("qwen2_audio")).head_left_whole
    fix = ensure_lm_head_plan(PreTrainedModel)
    ours = PreTrainedModel.post_init
    try:
        PreTrainedModel.post_init = lambda self: ours(self)
        theirs = PreTrainedModel.post_init
        fix.undo()
        assert PreTrainedModel.post_init is theirs
        assert audit_tp_plan(tiny("qwen2_audio")).head_left_whole
    finally:
        PreTrainedModel.post_init = original


def test_install_completes_plans_and_uninstall_restores_the_identical_method() -> None:
    original = PreTrainedModel.post_init
    tpv.install(fix_tp_plan=True)
    try:
        assert not audit_tp_plan(tiny("qwen2_audio")).head_left_whole
    finally:
        tpv.uninstall()
    assert PreTrainedModel.post_init is original
    assert audit_tp_plan(tiny("qwen2_audio")).head_left_whole


def test_live_models_and_configs_are_judged_by_their_own_plan() -> None:
    model = tiny("llama")
    tpv.validate_tp_compat(model, 2)
    assert tpv.valid_tp_degrees(model) == [1, 2]
    for judged in (model, model.config, tiny("qwen3_5_moe"), tiny("qwen3_5_moe").config):
        with pytest.raises(tpv.TPCompatError, match=r"must divide num_key_value_heads \(2\)"):
            tpv.validate_tp_compat(judged, 4)
    for name in ("k_proj", "v_proj"):
        model._tp_plan[f"model.layers.*.self_attn.{name}"] = "colwise_gather_output"
    tpv.validate_tp_compat(model, 4)


@pytest.mark.requires(transformers="5.23.0")  # which the list is of
def test_the_audit_of_all_classes_names_the_eight_and_none_with_the_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "audit.json"
    assert main(["hf-audit", "--output-format", "json", "--output-file", str(path)]) == 1
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["transformers"] == "5.23.0"
    assert content["head_left_whole"] == EIGHT_OF_5_23
    tied_by_half = {"Lfm2ForCausalLM", "Lfm2VlForConditionalGeneration", "Florence2ForConditionalGeneration"}
    assert tied_by_half <= set(content["fails"])
    seen = {audit["model"] for audit in content["audited"]} | {c["model"] for c in content["not_audited"]}
    assert seen == set(audited_classes())
    assert len(content["audited"]) > 280
    options = [option for name in (*EIGHT_OF_5_23, *content["fails"]) for option in ("--class", name)]
    assert main(["hf-audit", "--fixed", *options]) == 0
    assert "0 leave the output head whole, 0 shard half of a tied pair." in capsys.readouterr().out


def test_a_class_that_cannot_be_made_is_said_to_be_unknown_and_one_that_is_not_there_is_a_mistake(
    capsys: pytest.CaptureFixture[str],
) -> None:
    [result] = audit_installed(["NemotronForCausalLM"])
    assert result == NotAudited(
        "NemotronForCausalLM", "TypeError: unsupported operand type(s) for //: 'int' and 'NoneType'"
    )
    assert main(["hf-audit", "--class", "NemotronForCausalLM"]) == 2
    assert "Not audited, since no instance could be made:\n  NemotronForCausalLM:" in capsys.readouterr().out
    assert main(["hf-audit", "--class", "NoSuchForCausalLM"]) == 2
    assert "has no class NoSuchForCausalLM." in capsys.readouterr().err
