"""Jobs of torchtitan 0.3.x as its own parser makes them: `check` and the launcher, one answer."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from types import SimpleNamespace as NS
from typing import Any

import pytest

import torchtitan_tp_validate as tpv
from tests.core.cli.conftest import Program
from tests.torchtitan.optional import needs_torchao
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.guards import guards_in_place, recorded_check
from torchtitan_tp_validate.job import Options, check_job, parse_command_line
from torchtitan_tp_validate.releases import read_plan
from torchtitan_tp_validate.validate import judge

pytestmark = pytest.mark.requires(torchtitan="0.3")  # which registers its jobs

TP, EP = "--parallelism.tensor_parallel_degree", "--parallelism.expert_parallel_degree"
MINIMAL = ("--module", "deepseek_v3", "--config", "deepseek_v3_debugmodel_minimal_async_ep")
HYBRID = ("--module", "deepseek_v3", "--config", "deepseek_v3_16b_hybridep")
GRAPHS = [
    ("--module", f"graph_trainer.{model}", "--config", f"graph_trainer_{model}_debugmodel")
    for model in ("llama3", "deepseek_v3")
]
RECOMPUTE = ("activation-checkpoint:full",)


def deepseek(**more: Any) -> Any:
    from torchtitan.models.deepseek_v3 import model_registry

    return model_registry("debugmodel", **more).model


JUDGED_PLAINLY = Options()


def launched(
    *arguments: str, change: Callable[[Any], None] = lambda config: None, options: Options = JUDGED_PLAINLY
) -> list[str]:
    """What the launcher says of a run that it lets go on."""
    config = parse_command_line(arguments)
    change(config)
    before = repr(config)
    with tpv.installed(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tpv.install(allow=options.allow)
        recorded_check(config)
        check_job(config, guarded=guards_in_place(), options=options)  # as the Trainer starts
    assert repr(config) == before
    return [str(w.message) for w in caught if w.category is tpv.NotValidatedWarning]


def refused(*arguments: str) -> str:
    with pytest.raises(tpv.TPCompatError) as caught:
        launched(*arguments)
    return str(caught.value)


def test_a_job_whose_dispatcher_asks_for_the_whole_run_is_judged(tp_validate: Program) -> None:
    headline = "Tensor parallel degree (3) must divide n_heads (16). For DeepSeek-V3, max supported TP is 16."
    assert refused(*MINIMAL, TP, "3", EP, "2").startswith(headline)
    status, out, _ = tp_validate("check", "--", *MINIMAL, TP, "3", EP, "2")
    assert (status, out.splitlines()[1]) == (1, headline)
    assert launched(*MINIMAL, TP, "2", EP, "2", *RECOMPUTE) == []
    status, out, _ = tp_validate("check", "--", *MINIMAL, TP, "2", EP, "2", *RECOMPUTE)
    assert (status, out) == (
        0,
        "this run: TP 2 with EP 2 fits DeepSeek-V3 by torchtitan's rule. "
        "Degrees that work: 1, 2, 4, 8, 16.\n",
    )


def test_a_job_with_room_for_its_own_tokens_is_judged_by_them(tp_validate: Program) -> None:
    def room(config: Any) -> None:
        for layer in config.model_spec.model.layers:
            if layer.moe is not None:
                layer.moe.routed_experts.token_dispatcher.num_max_tokens_per_rank = 4096

    with pytest.raises(tpv.TPCompatError, match=r"must divide n_heads \(16\)"):
        launched(*HYBRID, TP, "32", EP, "8", change=room)
    assert launched(*HYBRID, TP, "16", EP, "8", change=room) == []
    # 4 sequences of 4096 tokens on 2 ranks
    with pytest.raises(tpv.RunError) as caught:
        launched(*HYBRID, TP, "2", EP, "8", change=room)
    assert str(caught.value).splitlines()[0] == (
        "This run cannot work: torchtitan itself refuses this run: HybridEPTokenDispatcher.Config "
        "num_max_tokens_per_rank (4096) is smaller than the required per-rank capacity (8192)."
    )


def test_what_torchtitan_itself_refuses_is_told_by_both(tp_validate: Program) -> None:
    run = ("--module", "llama3", "--config", "llama3_8b", "--training.seq_len", "262144", TP)
    with pytest.raises(tpv.RunError) as caught:
        launched(*run, "2")
    assert str(caught.value) == REFUSED_BY_TORCHTITAN
    status, out, _ = tp_validate("check", "--", *run, "2")
    assert (status, out) == (1, f"this run (by torchtitan's rule):\n{REFUSED_BY_TORCHTITAN}\n")
    # What is ours to refuse comes first, in every layer; the rest is told beside it.
    refusal = refused(*run, "16")
    assert refusal.startswith("Tensor parallel degree (16) must divide n_kv_heads (8).")
    assert "Beside that, of the run as a whole:" in refusal
    assert "RUN001" in refusal


REFUSED_BY_TORCHTITAN = """\
This run cannot work: torchtitan itself refuses this run: Training sequence length 262144 exceeds \
attention RoPE maximum supported sequence length 131072.

  RUN001 torchtitan itself refuses this run: Training sequence length 262144 exceeds attention RoPE
        maximum supported sequence length 131072:
        torchtitan looks at a model's config when the process groups are up.

Without this check: torchtitan stops every rank with these words, when the process groups are up.
To change it: do as it says."""


@pytest.mark.parametrize("backend", ["standard", "hybridep", "deepep", "minimal_async_ep"])
def test_a_bare_config_is_told_of_a_run_that_is_complete_enough(backend: str) -> None:
    config = deepseek(moe_comm_backend=backend)
    before = repr(config)
    assert read_plan(config, Degrees(tp=2, ep=2)).valid_degrees() == [1, 2, 4, 8, 16]
    with pytest.raises(tpv.TPCompatError, match=r"Expert parallel degree \(3\) must divide num_experts"):
        tpv.validate_tp_compat(config, NS(tp=2, ep=3))
    assert repr(config) == before


@pytest.mark.parametrize("run", GRAPHS, ids=lambda run: run[1])
def test_graph_trainer_is_refused_by_check_and_launcher_alike(
    run: tuple[str, ...],
    tp_validate: Program,
) -> None:
    message = refused(*run, TP, "3")
    assert message.startswith("Tensor parallel degree (3) must divide n_heads (16).")
    status, out, _ = tp_validate("check", "--", *run, TP, "3")
    assert (status, message in out) == (1, True)
    assert launched(*run, TP, "2") == []


def check_as_guarded(config: Any) -> None:
    check_job(config, guarded=[config.model_spec.parallelize_fn], options=Options(replicate_kv_heads=True))


def test_graph_trainer_is_refused_shared_heads_by_both(tp_validate: Program) -> None:
    run = ("--module", "graph_trainer.llama3", "--config", "graph_trainer_llama3_8b", TP, "16")
    with pytest.raises(
        tpv.KVReplicationError, match=r"graph_trainer.llama3 parallelizes this model"
    ) as caught:
        check_as_guarded(parse_command_line(run))
    status, out, _ = tp_validate("check", "--replicate-kv-heads", "--", *run)
    assert (status, out) == (2, f"this run: {caught.value}\n")


def test_a_solver_that_shards_as_it_sees_fit_is_not_judged_by_either(tp_validate: Program) -> None:
    reason = (
        "llama3 debugmodel is parallelized by torchtitan.experiments.graph_trainer.llama3."
        "_parallelize_fn with compile.enable_autoparallel, which is not guarded."
    )
    run = (*GRAPHS[0], TP, "4", "--compile.enable_autoparallel")
    assert launched(*run) == [f"Not validated at startup: {reason}"]
    assert tp_validate("check", "--", *run)[:2] == (2, f"this run: Not validated: {reason}\n")


def test_a_model_that_is_known_when_it_is_built_says_so_once() -> None:
    module = "transformers_modeling_backend"
    allowed = Options(allow=("NUM011",))
    assert launched("--module", module, "--config", f"{module}_full", TP, "2", options=allowed) == [
        "Not validated at startup: transformers_modeling_backend full: HFTransformerModel.Config gets "
        "its head counts from the Hugging Face model that the job names, when the model is built. It is "
        "tried again when the model is built."
    ]


def test_a_later_sharding_of_a_converted_config_is_judged_once_more_by_its_own_run() -> None:
    config = parse_command_line([*MINIMAL, TP, "2", EP, "2", *RECOMPUTE])
    plain = parse_command_line(["--module", "llama3", "--config", "llama3_8b", TP, "16"])
    check_as_guarded(plain)
    plain.model_spec.model.update_from_config(config=plain)
    assert plain.model_spec.model.layers[0].attention.n_kv_heads == 8
    with pytest.raises(tpv.KVReplicationError):
        check_as_guarded(config)


@needs_torchao
def test_low_precision_is_judged_as_on_its_hardware_and_says_so(
    tp_validate: Program,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = ("check", "--", "--module", "llama3", "--config", "llama3_debugmodel_nvfp4", TP)
    status, out, _ = tp_validate(*run, "2")
    assert (status, out) == (
        0,
        "this run: TP 2 fits Llama 3 by torchtitan's rule. Degrees that work: 1, 2. Not validated: the "
        "hardware: this machine has no GPU of SM100 or later, and the config was judged as on one.\n",
    )
    status, out, _ = tp_validate(*run, "4")
    assert status == 1
    assert out.splitlines()[1] == (
        "Tensor parallel degree (4) does not fit attention.wo.weight (256). "
        "For Llama 3, max supported TP is 2."
    )
    assert "  TP015 attention.qkv_linear.wqkv.weight = 768 is not a multiple of 512, in all 6 layers:" in out
    status, out, _ = tp_validate("check", "--", "--module", "flux", "--config", "flux_dev_mxfp8")
    assert (status, "which splits nothing. Not validated: the hardware: this machine" in out) == (0, True)


@needs_torchao
@pytest.mark.parametrize(
    ("module", "config", "ours"),
    [
        # ffn 768 = 48 * 16; wo and wqkv, 256 and 768, of heads of 16
        ("llama3", "llama3_debugmodel_float8", [1, 2, 4, 8, 16]),
        # heads of 128 and 8 KV heads; 4096 = 128 * 32
        ("llama3", "llama3_8b_mxfp8", [1, 2, 4, 8]),
        # ffn 53248 = 2^12 * 13
        ("llama3", "llama3_405b", [1, 2, 4, 8]),
    ],
)
def test_low_precision_degrees_leave_whole_blocks(
    module: str,
    config: str,
    ours: list[int],
    tp_validate: Program,
) -> None:
    status, out, _ = tp_validate(
        "check", "--output-format", "json", "--", "--module", module, "--config", config, TP, "2"
    )
    (result,) = json.loads(out)["results"]
    assert (status, result["valid_tp_degrees"]) == (0, ours)


@needs_torchao
@pytest.mark.parametrize(("rows", "columns"), [(32, 40), (40, 32)])
def test_torch_takes_whole_blocks_of_float8_only(rows: int, columns: int) -> None:
    import torch
    from torchao.float8 import Float8LinearConfig
    from torchtitan.components.quantization.float8 import Float8Linear

    def multiply(rows: int, columns: int) -> None:
        recipe = Float8LinearConfig.from_recipe_name("rowwise")
        with torch.device("meta"):
            linear = Float8Linear.Config(in_features=rows, out_features=columns, _torchao_config=recipe)
            linear.build().to(torch.bfloat16)(torch.empty(64, rows, dtype=torch.bfloat16))

    multiply(32, 48)
    with pytest.raises(RuntimeError, match="divisible by 16"):
        multiply(rows, columns)


@needs_torchao
@pytest.mark.parametrize("size", [192, 64])  # what TP 4 leaves of the debug model's wqkv and wo
def test_torchao_takes_whole_blocks_of_nvfp4_only(size: int) -> None:
    import torch

    nvfp4 = pytest.importorskip("torchao.prototype.moe_training.nvfp4_training.nvfp4_linear")
    with torch.device("meta"), pytest.raises(Exception, match="divisible by 128"):
        nvfp4.nvfp4_linear(
            torch.empty(128, 256, dtype=torch.bfloat16),
            torch.empty(size, 256, dtype=torch.bfloat16),
            None,
            sr_seed=torch.empty(1, dtype=torch.int64),
            sign_vector=(1,) * 16,
        )


def test_a_rule_without_its_input_is_named_and_the_installed_field_is_called_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = deepseek()

    def not_judged(**degrees: Any) -> tuple[str, ...]:
        return read_plan(model, Degrees(tp=2, **degrees)).not_judged

    assert not_judged() == ("TP009: no seq_len is given",)
    assert not_judged(seq_len=64) == not_judged(sequence_parallel=False) == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tpv.validate_tp_compat(model, 2)
    tree, field = (
        NS(layers=[NS(attention=NS(n_heads=16, n_kv_heads=16))]),
        "num_tokens_per_microbatch_per_dp_rank",
    )
    fields = type("TrainingConfig", (), {"__dataclass_fields__": {field: None}})
    monkeypatch.setattr("torchtitan.config.TrainingConfig", fields)
    assert read_plan(tree, Degrees(tp=2)).not_judged == (f"TP009: no {field} is given",)
    with pytest.raises(tpv.TPCompatError, match=rf"must divide {field} \(4097\)") as caught:
        judge(tree, Degrees(tp=2, seq_len=4097))
    assert caught.value.violations[0].where == f"training.{field}"


def test_what_a_tree_lacks_for_a_rule_is_named() -> None:
    def not_judged(config: Any) -> tuple[str, ...]:
        return read_plan(NS(config=config), Degrees(tp=2, seq_len=64)).not_judged

    def declared() -> Any:
        config = deepseek()
        config.update_from_config(config=parse_command_line([*MINIMAL[:3], "deepseek_v3_debugmodel"]))
        return config

    assert not_judged(declared()) == ()
    config = declared()
    for layer in config.layers:
        # an attention that names its heads otherwise
        layer.attention = _as_another(layer.attention, without="n_heads")
    assert not_judged(config)[0] == "TP001, TP002: layers[0].attention has no n_heads"
    config = declared()
    moe = next(layer.moe for layer in config.layers if layer.moe is not None)
    moe.routed_experts.inner_experts = _as_another(moe.routed_experts.inner_experts, without="hidden_dim")
    assert [n for n in not_judged(config) if n.startswith("TP013, FSDP001: ")] == [
        "TP013, FSDP001: layers[1].moe.routed_experts.inner_experts has no hidden_dim"
    ]
    config = declared()
    shardings = config.lm_head.sharding_config.state_shardings
    shardings["renamed"] = shardings["weight"]
    assert not_judged(config) == ("TP012: lm_head.renamed is not there",)


def _as_another(config: Any, *, without: str) -> Any:
    """The same config under a class that lacks a field; its module is the same."""
    fields = [f for f in dataclasses.fields(config) if f.name != without]
    other = dataclasses.make_dataclass(
        "Config", [(f.name, f.type) for f in fields], namespace={"build": lambda self: config.build()}
    )
    return other(**{f.name: getattr(config, f.name) for f in fields})
