"""What rehearsals of real jobs find; those of docs/rehearsal.md are run by tests/docs."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest

from tests.rehearsal import warm
from torchtitan_tp_validate.errors import RehearsalError
from torchtitan_tp_validate.rehearsal.findings import Rehearsal
from torchtitan_tp_validate.rehearsal.told import whole_text

TP_2 = {"tensor_parallel_degree": 2}
TP_2_FLAG = ("--parallelism.tensor_parallel_degree", "2")
EP_2_FLAG = ("--parallelism.expert_parallel_degree", "2")
OWN = "tests.rehearsal.own_model"
TRANSFORMERS = "transformers_modeling_backend"
FOLDER = "{folder}"

SMALL = {"model": "llama3", "flavor": "debugmodel"}
REQUESTS: dict[str, dict[str, dict[str, Any]]] = {
    "0.2": {
        "dense": {"model": "llama3", "flavor": "8B", "degrees": TP_2},
    },
    "0.3": {
        "pp": {**SMALL, "degrees": {"pipeline_parallel_degree": 2}},
        "cp": {**SMALL, "degrees": {"context_parallel_degree": 2}},
        "one microbatch": {
            "arguments": (
                *("--module", "llama3", "--config", "llama3_8b", "--training.disable_cuda_graphs"),
                *("--parallelism.pipeline_parallel_degree", "2"),
            ),
        },
        "refused": {
            "arguments": ("--module", "qwen3_5", "--config", "qwen35_35b_a3b", TP_2_FLAG[0], "4"),
            "ranks": 4,
        },
        "float8": {"arguments": ("--module", "llama3", "--config", "llama3_debugmodel_float8", *TP_2_FLAG)},
        "traced": {
            "arguments": (
                *("--module", "graph_trainer.llama3", "--config", "graph_trainer_llama3_debugmodel"),
                *(*TP_2_FLAG, "--parallelism.data_parallel_shard_degree", "1"),
            )
        },
        "traced pipeline": {
            "arguments": (
                *("--module", "graph_trainer.llama3", "--config", "graph_trainer_llama3_debugmodel"),
                *("--parallelism.pipeline_parallel_degree", "2", "--training.disable_cuda_graphs"),
                *(
                    "--parallelism.tensor_parallel_degree",
                    "1",
                    "--parallelism.data_parallel_shard_degree",
                    "1",
                ),
            )
        },
        "own": {"arguments": ("--module", OWN, "--config", "own_8b", *TP_2_FLAG)},
        "own square": {"model": OWN, "flavor": "8B-square", "degrees": TP_2},
        "own shared": {"model": OWN, "flavor": "small-shared", "degrees": TP_2},
        "shared muse": {
            **{"model": "muse_glimmer", "flavor": "debugmodel", "degrees": {"tensor_parallel_degree": 4}},
            **{"replicate_kv_heads": True, "ranks": 4},
        },
        "hybridep": {
            "arguments": (
                *("--module", "deepseek_v3", "--config", "deepseek_v3_16b_hybridep", *TP_2_FLAG, *EP_2_FLAG),
            )
        },
        "DistMuon": {"arguments": ("--module", "kimi_k2_7", "--config", "moonlight_16b_a3b", *EP_2_FLAG)},
        "transformers repaired": {"arguments": (), "repair": True},
        "shared transformers": {"arguments": (), "repair": True, "replicate_kv_heads": True, "ranks": 4},
        "transformers": {
            "arguments": (
                *("--module", TRANSFORMERS, "--config", f"{TRANSFORMERS}_full", "--hf_model", FOLDER),
                *TP_2_FLAG,
            )
        },
    },
}

pytestmark = pytest.mark.xdist_group("rehearsals")


@pytest.fixture(scope="module")
def rehearse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Rehearsal]:
    """Return what came of one of the requests of the installed line."""
    requests = REQUESTS[version("torchtitan")[:3]]
    config = tmp_path_factory.mktemp("config")
    if "transformers" in requests:
        from transformers import Qwen3Config

        Qwen3Config(architectures=["Qwen3ForCausalLM"], num_key_value_heads=2).save_pretrained(config)
        words = requests["transformers"]["arguments"]
        requests["transformers"]["arguments"] = [str(config) if word == FOLDER else word for word in words]
        named = requests["transformers"]["arguments"]
        requests["transformers repaired"]["arguments"] = named
        requests["shared transformers"]["arguments"] = [*named[:-1], "4"]
    out = tmp_path_factory.mktemp("rehearsals")
    warm.rehearse_all(requests, out)
    return lambda name: warm.found(out, name)


Rehearse = Callable[[str], Rehearsal]


@pytest.mark.requires(torchtitan="0.2")
def test_a_dense_model_of_0_2_is_equal_to_one_process(rehearse: Rehearse) -> None:
    seen = rehearse("dense")
    assert (seen.outcome, seen.differences, seen.degrees) == ("equal", (), {"tp": 2})
    assert 0 < seen.worst < 1e-5


@pytest.mark.requires(torchtitan="0.3")
@pytest.mark.parametrize("axis", ["pp", "cp"])
def test_stages_of_a_pipeline_and_cut_sequences_are_equal_to_one_process(
    rehearse: Rehearse, axis: str
) -> None:
    seen = rehearse(axis)
    assert (seen.outcome, seen.degrees) == ("equal", {axis: 2}), whole_text(seen)


@pytest.mark.requires(torchtitan="0.3")
def test_a_pipeline_with_too_few_microbatches_is_seen_to_die(rehearse: Rehearse) -> None:
    seen = rehearse("one microbatch")
    assert (seen.outcome, "PP005" in seen.verdict) == ("dies", True)
    assert seen.ends[0]["error"] == (
        "ValueError: Number of microbatches (1) must be greater than or equal to the number of stages (2)."
    )


@pytest.mark.requires(torchtitan="0.3")
def test_what_the_rules_refuse_is_seen_to_die(rehearse: Rehearse) -> None:
    lines = whole_text(rehearse("refused")).splitlines()
    assert lines[:2] == [
        "qwen3_5 35B-A3B at tp 4, ep 2: dies",
        "  rank 0 and 3 more, building and parallelizing the model: ValueError: tensor_parallel_degree (4) "
        "must divide n_kv_heads (2).",
    ]
    verdict = "Tensor parallel degree (4) must divide n_kv_heads (2). For Qwen3.5-MoE, max supported TP is 2."
    assert f"  by the rules: {verdict}" in lines


@pytest.mark.requires(torchtitan="0.3")
@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("float8", "Float8Linear in fp32"),
        ("hybridep", "AllToAllTokenDispatcher for HybridEPTokenDispatcher"),
        ("DistMuon", "AdamW for DistMuon"),
    ],
)
def test_what_takes_a_gpu_is_replaced_and_said_to_be(rehearse: Rehearse, name: str, replaced: str) -> None:
    seen = rehearse(name)
    expected = (replaced, "an epsilon of 1 for Adam", "flex attention")
    assert (seen.outcome, seen.stand_ins) == ("equal", expected), whole_text(seen)


@pytest.mark.requires(torchtitan="0.3")
def test_what_is_traced_to_a_graph_is_equal_to_one_process(rehearse: Rehearse) -> None:
    """What modules compute is not known then: they are called with tensors without values."""
    seen = rehearse("traced")
    assert (seen.outcome, seen.degrees) == ("equal", {"tp": 2}), whole_text(seen)


@pytest.mark.requires(torchtitan="0.3")
def test_pipelines_that_are_traced_die_and_are_refused(rehearse: Rehearse) -> None:
    seen = rehearse("traced pipeline")
    assert (seen.outcome, "PP012" in seen.verdict) == ("dies", True), whole_text(seen)
    assert seen.ends[0]["error"] == "AttributeError: 'GraphPipelineStage' object has no attribute 'fwd_cache'"


@pytest.mark.requires(torchtitan="0.3")
def test_a_package_of_somebody_s_own_is_made_small_by_the_same_rules(rehearse: Rehearse) -> None:
    seen = rehearse("own")
    assert (seen.model, seen.outcome) == ("own 8B", "equal"), whole_text(seen)


@pytest.mark.requires(torchtitan="0.3")
def test_what_cannot_be_made_small_is_rehearsed_as_it_is_if_it_is_small(rehearse: Rehearse) -> None:
    with pytest.raises(RehearsalError) as caught:
        rehearse("own square")
    assert str(caught.value) == (
        "layers[0].expander.widen is 4096 by 4096, and the model's dim is 4096: it is not known whether it "
        "reads or writes the residual stream; rehearse a flavor of at most 50,000,000 parameters, which is "
        "taken as it is: this one has 3,466,858,496."
    )
    assert rehearse("own shared").outcome == "equal"


@pytest.mark.requires(torchtitan="0.3")
@pytest.mark.parametrize("name", ["own shared", "shared muse", "shared transformers"])
def test_ranks_share_heads_by_the_converter_of_ones_own_config_and_by_the_flag(
    rehearse: Rehearse, name: str
) -> None:
    seen = rehearse(name)
    assert (seen.outcome, seen.cuts) == ("equal", ()), whole_text(seen)


@pytest.mark.requires(torchtitan="0.3")
def test_the_transformers_backend_never_initializes_its_rotary_embedding(rehearse: Rehearse) -> None:
    """It looks for ``rope_init_fn``, which no rotary embedding of transformers 5 keeps; all else is equal."""
    seen = rehearse("transformers")
    assert seen.outcome == "differs"
    assert {(one.what, one.name) for one in seen.differences} == {
        ("uninitialized", f"model.model.rotary_emb.{name}") for name in ("inv_freq", "original_inv_freq")
    }
    assert "NUM011" in seen.verdict
    repaired = rehearse("transformers repaired")
    assert repaired.outcome == "equal", whole_text(repaired)
