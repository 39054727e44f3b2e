"""The shipped plans are those of the installed transformers, and say of a file what its class does.

No torchrun, no weights: classes are made on the meta device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

import torchtitan_tp_validate as tpv
from tests.transformers.test_native_tp import RELEASE
from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.releases.transformers_plans import load, plan_at
from torchtitan_tp_validate.transformers_tp.audit import audited_classes, instantiate
from torchtitan_tp_validate.transformers_tp.model import effective_plan, rule_of
from torchtitan_tp_validate.transformers_tp.plan_table import read_installed

pytestmark = pytest.mark.skipif(RELEASE not in load().releases, reason="this release is not in the table")

DEGREES = (2, 3, 4, 5, 7, 8, 12, 16, 32, 64)


def in_table(name: str) -> dict[str, Any]:
    index = load().releases.index(RELEASE)
    plans = {key: plan_at(changes, index) for key, changes in getattr(load(), name).items()}
    return {key: plan for key, plan in plans.items() if plan is not None}


def test_the_shipped_plans_are_those_of_the_installed_release() -> None:
    installed = read_installed()
    assert installed.release == RELEASE
    assert in_table("model_types") == installed.model_types
    assert in_table("classes") == installed.classes


def heads_of_colwise(model: Any) -> Iterator[tuple[str, int]]:
    """(name, heads) of every projection of an attention that the live plan shards by ``colwise``."""
    plan = effective_plan(model)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent, _, projection = name.removesuffix(".linear").rpartition(".")
        attention = modules.get(parent)
        if rule_of(name, plan) != "colwise" or not re.search("Attention|MLA", type(attention).__name__):
            continue
        if projection == "v_proj":
            size = getattr(attention, "v_head_dim", None) or attention.head_dim
        elif projection in ("q_proj", "k_proj"):
            size = getattr(attention, "qk_head_dim", None) or attention.head_dim
        elif projection == "q_b_proj":
            size = attention.qk_head_dim
        elif projection == "q_gate_proj":  # queries and a gate of the width of the values
            size = attention.qk_head_dim + attention.v_head_dim
        elif projection == "kv_b_proj":
            size = attention.qk_nope_head_dim + attention.v_head_dim
        elif projection == "query_key_value":
            size = 3 * attention.head_size
        else:
            continue
        heads, rest = divmod(module.weight.shape[0], size)
        assert not rest, (name, module.weight.shape, size)
        yield name, heads


def saved(model: Any) -> dict[str, Any]:
    """What ``config.json`` of this model says."""
    content = json.loads(model.config.to_json_string(use_diff=True))
    return {**content, "architectures": [type(model).__name__]}


def fitting(model_or_config: Any) -> list[int] | None:
    """The degrees that are accepted, or None when there is no plan."""
    accepted = []
    for tp in DEGREES:
        try:
            tpv.validate_tp_compat(model_or_config, tp)
        except tpv.TPCompatError:
            continue
        except PlanError as error:
            if "has no tensor parallel plan for" not in str(error):
                raise
            return None
        accepted.append(tp)
    return accepted


def test_of_every_class_the_file_the_config_and_the_model_are_judged_by_what_its_live_plan_shards() -> None:
    judged, unread, wrong = 0, {}, {}
    for name in audited_classes():
        cls = getattr(transformers, name)
        if not hasattr(cls, "config_class") or "PreTrainedModelFor" in name:  # the latter are base classes
            continue
        try:
            model = instantiate(cls)
        except PlanError:
            continue
        try:
            heads = dict(heads_of_colwise(model))
        except (AssertionError, AttributeError) as error:
            wrong[name] = repr(error)
            continue
        sharded = effective_plan(model)
        expected = [tp for tp in DEGREES if not any(n % tp for n in heads.values())] if sharded else None
        for kind, what in (("file", saved(model)), ("config", model.config), ("model", model)):
            try:
                found = fitting(what)
            except PlanError as error:
                unread[name] = str(error)
                continue
            judged += 1
            if found != expected:
                wrong[f"{name} as {kind}"] = (found, expected, set(heads.values()))
    print(f"{judged} judged; not read: {unread}")
    assert wrong == {}
    assert judged > 500


def test_a_class_without_a_plan_is_refused_by_transformers_itself_from_5_21_on() -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    assert not effective_plan(model)
    if RELEASE >= (5, 21):
        consequence = (
            "it refuses to load it with a tp_size above 1 unless DistributedConfig(tp_plan={...}) brings one."
        )
        distributed = transformers.distributed.DistributedConfig(tp_size=2)
        with pytest.raises(ValueError, match="has no `tp_plan`"):
            model._resolve_parallel_plans(distributed)
    else:
        consequence = "it loads with any tp_size, and every rank holds all of it."
    version = ".".join(map(str, RELEASE))
    text = f"Not validated: transformers {version} has no tensor parallel plan for gpt2: {consequence}"
    for what in (saved(model), config, model):
        with pytest.raises(PlanError) as caught:
            tpv.validate_tp_compat(what, 2)
        assert str(caught.value) == text
