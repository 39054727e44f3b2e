"""The installed torchtitan, whichever release it is: its registries, specs and signatures."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import math
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace as NS

import pytest
import torch

import torchtitan_tp_validate as tpv
from tests.torchtitan.installed import HAS_CONFIG_TREES, RELEASE
from tests.torchtitan.optional import missing_for_qwen3_5
from torchtitan_tp_validate import registry
from torchtitan_tp_validate.guards import guards_in_place
from torchtitan_tp_validate.identity import Identity, torchtitan_identity
from torchtitan_tp_validate.job import unguarded
from torchtitan_tp_validate.plan import divisors
from torchtitan_tp_validate.wrappers import TARGETS

# Registered, and not ours to guard.
NOT_GUARDED = {
    "flux": "has no tensor parallelism",
    "vlm": "refuses tensor parallelism itself",
    "rl": "no model of its own: it wraps the others",
    "alphabet_sort": "an RL example",
    "dapo_math": "an RL example",
    "search_r1": "an RL example",
    "autoparallel.llama3": "shards by a solver; needs a package that no index has",
    "autoparallel.deepseek_v3": "shards by a solver; needs a package that no index has",
    "autoparallel.local_map_deepseek_v3": "shards by a solver; needs a package that no index has",
}

# n_heads, n_kv_heads, gated-delta and vision heads as the models' publishers give them.
PUBLISHED = {
    ("llama3", "8B"): (32, 8),
    ("llama3", "70B"): (64, 8),
    ("llama3", "405B"): (128, 8),
    ("llama4", "17bx16e"): (40, 8),
    ("qwen3", "0.6B"): (16, 8),
    ("qwen3", "30B-A3B"): (32, 4),
    ("qwen3_5", "4B"): (16, 4, 16, 32, 16),
    ("qwen3_5", "35B-A3B"): (16, 2, 16, 32, 16),
    ("qwen3_5", "397B-A17B"): (32, 2, 16, 64, 16),
    ("deepseek_v3", "671B"): (128,),
    ("gpt_oss", "120b"): (64, 8),
    ("kimi_k2_7", "Kimi-K2.5"): (64, 16),
    ("muse_glimmer", "30B"): (32, 2),
}


@pytest.fixture
def guards() -> Iterator[tpv.Installation]:
    with tpv.installed() as installation:
        yield installation


def _model(name: str) -> registry.Model:
    if name == "qwen3_5" and missing_for_qwen3_5:
        pytest.skip(f"it imports {missing_for_qwen3_5}")
    return registry.model(name)


@pytest.mark.parametrize("name", registry.names())
def test_every_registered_model_is_guarded_or_listed_with_a_reason(
    name: str, guards: tpv.Installation
) -> None:
    if name in NOT_GUARDED:
        pytest.skip(NOT_GUARDED[name])
    model = _model(name)
    spec = model.spec(next(iter(model.flavors)))
    assert unguarded(spec, guarded=guards_in_place()) is None
    function = spec.parallelize_fn
    if function not in guards_in_place():
        # graph_trainer wraps its own copy, which is the one that is guarded.
        function = next(f for key, f in function.__globals__.items() if key.startswith("parallelize_"))
    model = NS(config=NS(layers=[NS(attention=NS(n_heads=8, n_kv_heads=2))]))
    others = inspect.signature(function).parameters.keys() - {"model", "parallel_dims"}
    with pytest.raises(tpv.TPCompatError):
        function(model, parallel_dims=NS(tp=4), **dict.fromkeys(others))


@pytest.mark.parametrize("name", sorted(set(registry.names()) - set(NOT_GUARDED)))
def test_every_registered_flavor_is_read(name: str) -> None:
    model = _model(name)
    for flavor in model.flavors:
        if name == "transformers_modeling_backend" and flavor in ("full", "full_moe", "sft_full"):
            continue  # its counts come from a Hugging Face config that the job names
        degrees = tpv.valid_tp_degrees(model.spec(flavor).config)
        assert degrees[0] == 1, flavor
        if (name, flavor) in PUBLISHED:
            assert degrees == divisors(math.gcd(*PUBLISHED[name, flavor])), flavor


@pytest.mark.requires(torchtitan="0.")
def test_the_installed_release_is_told_by_its_files() -> None:
    release = version("torchtitan")
    assert torchtitan_identity() == Identity(release, release)


def test_no_known_entry_point_is_at_fault_in_this_release(guards: tpv.Installation) -> None:
    assert [state for state in guards.targets if state.faulty] == []
    expected = {"llama3", "qwen3", "deepseek_v3"} | (
        {"qwen3_5_moe", "gpt_oss"} if HAS_CONFIG_TREES else {"llama4"}
    )
    assert expected <= {state.model for state in guards.guarded}
    if RELEASE != "main":
        tpv.install(strict=True)
        return
    with pytest.raises(tpv.InstallError, match=r"torchtitan main .* entry points were found in it"):
        tpv.install(strict=True)


@pytest.mark.parametrize("wrapper", TARGETS)
def test_the_drop_in_has_upstreams_signature(wrapper: str) -> None:
    if wrapper == "qwen3_5_moe" and HAS_CONFIG_TREES:
        _model("qwen3_5")
    target = TARGETS[wrapper]
    entry_point = next(target.entry_points(), None)
    module = importlib.import_module(f"torchtitan_tp_validate.wrappers.{wrapper}")
    if entry_point is None:
        with pytest.raises(ImportError, match=f"has no {target.name}"):
            getattr(module, target.name)
        return
    drop_in, upstream = getattr(module, target.name), entry_point.load()
    assert inspect.signature(drop_in) == inspect.signature(upstream)
    assert drop_in.__wrapped__ is upstream
    assert getattr(module, entry_point.function) is drop_in


def test_a_spec_built_before_install_is_guarded_and_then_restored() -> None:
    name, flavor = ("qwen3_5", "debugmodel_moe") if HAS_CONFIG_TREES else ("llama4", "debugmodel")
    spec = _model(name).spec(flavor)
    keep = [spec.parallelize_fn]
    with tpv.installed():
        assert spec.parallelize_fn in guards_in_place()
        assert spec.parallelize_fn.__wrapped__ is keep[0]
    assert spec.parallelize_fn is keep[0]


@pytest.mark.skipif(
    "transformers_modeling_backend" not in registry.names(), reason="this torchtitan has no such backend"
)
def test_the_transformers_backend_is_refused_by_the_counts_of_its_hugging_face_config(
    tmp_path: Path, guards: tpv.Installation
) -> None:
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "vocab_size": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(llama))
    spec = registry.model("transformers_modeling_backend").spec("full")
    # The registry hands out one object, which other tests look at as it is.
    config = copy.deepcopy(spec.config)
    before = NS(training=NS(seq_len=32, max_context_length=32), debug=NS(deterministic=False))
    if not HAS_CONFIG_TREES:
        before.hf_transformers = NS(model=str(tmp_path))
        config.update_from_config(before)
    else:
        before.hf_model, before.loss, before.parallelism = str(tmp_path), NS(), NS(expert_parallel_degree=1)
        config.update_from_config(config=before)
    with torch.device("meta"):
        if not HAS_CONFIG_TREES:
            train_spec = importlib.import_module("torchtitan.protocols.train_spec")
            model = train_spec.get_train_spec("transformers_modeling_backend").model_cls(config)
        else:
            model = config.build()

    assert tpv.valid_tp_degrees(model) == tpv.valid_tp_degrees(config) == [1, 2]
    # With transformers 5 the config of 0.2.2 keeps its own 32 query heads.
    shared = [degree for degree in (1, 2, 4, 8, 16, 32) if config.n_heads % degree == 0]
    assert tpv.valid_tp_degrees(model, replicate_kv_heads=True) == shared
    others = inspect.signature(spec.parallelize_fn).parameters.keys() - {"model", "parallel_dims"}
    with pytest.raises(tpv.TPCompatError, match=r"must divide n_kv_heads \(2\). For llama, max"):
        spec.parallelize_fn(model, parallel_dims=NS(tp=4), **dict.fromkeys(others))
