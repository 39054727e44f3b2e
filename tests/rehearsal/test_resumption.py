"""What is said of a checkpoint that a run is to load is what comes of it on real ranks."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.forked import run_program
from tests.rehearsal.resumed import VOCAB_SIZE
from tests.rehearsal.test_memory import ALLOWED, OLD, run_of
from torchtitan_tp_validate.cli.torchtitan import judge_run
from torchtitan_tp_validate.job import Options

pytestmark = pytest.mark.xdist_group("resumption")

MISSING = "Missing key in checkpoint state_dict: "
STEP = Path("checkpoint", "step-1")
INCONSISTENT = "AssertionError: dp_degree is inconsistent before and after checkpoint"
KINDS = (
    {
        "deepseek_v3": "debugmodel",
        "llama4": "debugmodel",
        "qwen3": "debugmodel_moe",
        "gpt_oss": "debugmodel",
    }
    if OLD
    else {
        "deepseek_v3": "debugmodel",
        "gpt_oss": "debugmodel",
        "muse_glimmer": "debugmodel",
        "qwen3_5": "debugmodel_moe",
    }
)
"""Models with more than weights of linears: experts, their biases, buffers, and what is tied."""

TRANSPOSED = "llama4" if OLD else "qwen3_5"
CONFIGS = {"qwen3_5": "qwen35_debugmodel_moe"}

ONE = dict.fromkeys(("tensor_parallel", "pipeline_parallel", "data_parallel_shard", "expert_parallel"), 1)

LLAMA = {"model": "llama3", "flavor": "debugmodel"}
QWEN = {"model": "qwen3", "flavor": "debugmodel_non_fused_qkv"}
TRANSFORMERS = {"model": "transformers_modeling_backend", "flavor": "full"}
MESHES = (
    ({"tensor_parallel": 2, "context_parallel": 2}, 4),
    ({"tensor_parallel": 4}, 4),
    ({"tensor_parallel": 1}, 1),
)
"""With one KV head, the ranks of TP 2 and 4 share it."""

of_0_3 = pytest.mark.requires(torchtitan="0.3")

Run = tuple[str, list[str], int]


def of(
    folder: Path, *more: str, model: str = "llama3", flavor: str = "debugmodel", **degrees: int
) -> list[str]:
    """The arguments of a run that keeps its checkpoints in a folder."""
    named = run_of(model, flavor, CONFIGS.get(model, f"{model}_{flavor}"))
    words = [
        *named,
        "--job.dump_folder" if OLD else "--dump_folder",
        str(folder),
        "--checkpoint.enable",
        *more,
    ]
    if model == TRANSFORMERS["model"]:
        words += ["--hf_model", str(folder), "--parallelism.context_parallel_load_balancer", "ptrr"]
    for axis, degree in degrees.items():
        words += [f"--parallelism.{axis}_degree", str(degree)]
    return words


def write_qwen3(folder: Path) -> None:
    """Write the config of a small model of transformers, with one KV head."""
    from transformers import Qwen3Config

    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": VOCAB_SIZE}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 1}
    Qwen3Config(architectures=["Qwen3ForCausalLM"], **sizes, **layers).save_pretrained(folder)


def outcomes(runs: list[Run], out: Path) -> list[str]:
    (out / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    run_program("tests.rehearsal.resumed", out)
    found: list[str] = json.loads((out / "outcomes.json").read_text(encoding="utf-8"))
    return found


def codes(run: Run) -> list[str]:
    """What the rules say of a run."""
    what, arguments, ranks = run
    options = Options(replicate_kv_heads="replicated" in what, world_size=ranks, allow=ALLOWED)
    (judgement,) = judge_run(arguments, options).judgements
    return [problem.code for problem in judgement.error.problems] if judgement.error else []


def test_a_run_resumes_or_dies_as_is_said(tmp_path: Path) -> None:
    one, two, alone, hf, new = (tmp_path / name for name in ("one", "two", "alone", "hf", "new"))
    sharded = {"data_parallel_shard": 2}
    saves: list[Run] = [
        ("save", of(one), 1),
        ("save", of(two, **sharded), 2),
        ("save the last", of(alone), 1),
        ("save the last", of(hf, "--checkpoint.last_save_model_only", "--checkpoint.last_save_in_hf"), 1),
    ]
    assert outcomes(saves, tmp_path) == [""] * len(saves)
    weights = ("--checkpoint.initial_load_path", str(alone / STEP))
    in_hf = ("--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path", str(hf / STEP))
    without_data = ("--checkpoint.exclude_from_loading", "dataloader")
    loads: list[tuple[Run, str, list[str]]] = [
        (("load", of(one, tensor_parallel=2), 2), "", []),
        (("load", of(two, data_parallel_shard=1, data_parallel_replicate=2), 2), "", []),
        (("load", of(two, tensor_parallel=2), 2), INCONSISTENT, ["CKPT002"]),
        (("load", of(one, **sharded), 2), f"{MISSING}dataloader.dp_rank_1", ["CKPT002"]),
        (("load", of(one, *without_data, **sharded), 2), "", []),
        (("load", of(alone), 1), MISSING, ["CKPT003"]),
        (("load", of(new, *weights), 1), "", []),
        (("load", of(new, *weights, model="qwen3"), 1), MISSING, ["CKPT004"]),
        (("load", of(hf), 1), "metadata is None", ["CKPT003"]),
        (("load", of(new, *in_hf), 1), "", []),
        (("load", of(new, *in_hf, model="qwen3"), 1), "Size mismatch between saved", ["CKPT004"]),
    ]
    if not OLD:
        # The optimizer's state is named after the parameters, and wqkv becomes three.
        loads.append((("load replicated", of(one), 1), f"{MISSING}optimizer.", ["CKPT004"]))
        lora = of(new, *weights, flavor="debugmodel_float8_emulate_lora")
        loads.append((("load", lora, 1), f"{MISSING}layers.0.attention.wo.lora_a", ["CKPT004", "NUM007"]))
    runs = [run for run, _, _ in loads]
    for (run, words, said), outcome in zip(loads, outcomes(runs, tmp_path), strict=True):
        assert (words in outcome) if words else outcome == "", run
        assert codes(run) == said, run


def test_transposed_experts_are_saved_for_hugging_face_when_repaired(tmp_path: Path) -> None:
    saves = ("--checkpoint.last_save_model_only", "--checkpoint.last_save_in_hf")
    loads = ("--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path")
    model = {"model": TRANSPOSED, "flavor": KINDS[TRANSPOSED], **ONE}
    stock, repaired = of(tmp_path / "stock", *saves, **model), of(tmp_path / "repaired", *saves, **model)
    runs: list[Run] = [
        ("save the last", stock, 1),
        ("save the last repaired", repaired, 1),
        ("load", of(tmp_path / "new", *loads, str(tmp_path / "repaired" / STEP), **model), 1),
    ]
    assert codes(runs[0]) == ["CKPT005"]
    died, *fine = outcomes(runs, tmp_path)
    assert "You are trying to save a non contiguous tensor" in died
    assert fine == ["", ""]
    assert codes(runs[2]) == []


@pytest.mark.requires(torchtitan="0.3")
def test_what_was_trained_without_images_is_resumed_when_repaired(tmp_path: Path) -> None:
    small = ("--training.seq_len", "64", "--training.local_batch_size", "1")
    model = {"model": "qwen3_5", "flavor": KINDS["qwen3_5"], **ONE}
    stock, repaired = of(tmp_path / "stock", *small, **model), of(tmp_path / "repaired", *small, **model)
    runs: list[Run] = [
        ("train and save", stock, 1),
        ("load", stock, 1),
        ("train and save repaired", repaired, 1),
        ("load", repaired, 1),
    ]
    saved, loaded, *fine = outcomes(runs, tmp_path)
    assert saved == ""
    assert f"{MISSING}optimizer.state.vision_encoder." in loaded
    assert fine == ["", ""]
    assert codes(runs[1]) == ["CKPT004"]
    assert codes(runs[3]) == []


@pytest.mark.parametrize(
    ("model", "what", "same"),
    [
        # Of 6 layers of 9 weights, and 3 others: the weight, two moments and the number of steps.
        pytest.param(LLAMA, "replicated", 4 * 57, id="all"),
        # Of 2 layers of 11 weights, and 3 others.
        pytest.param(TRANSFORMERS, "repaired replicated", 4 * 25, id="transformers", marks=of_0_3),
        # Besides 8 layers of 11 weights, and 3 others, so much of two adapters of 7 weights and the head.
        pytest.param(QWEN, "adapted repaired replicated", 91 + 4 * 2 * 57, id="adapters", marks=of_0_3),
    ],
)
def test_shared_heads_move_bit_for_bit_between_degrees_with_context_parallelism_and_without(
    tmp_path: Path, model: dict[str, Any], what: str, same: int
) -> None:
    if model is TRANSFORMERS:
        write_qwen3(tmp_path)
    # Each loads what the one before it has saved.
    chain = [*MESHES, MESHES[0]]
    runs: list[Run] = [
        (f"load and save {what}", of(tmp_path, **model, **mesh), ranks) for mesh, ranks in chain
    ]
    runs[0] = (f"train and save {what}", *runs[0][1:])
    assert outcomes(runs, tmp_path) == [""] * len(runs)
    steps = [str(tmp_path / "checkpoint" / f"step-{index + 1}") for index in range(len(runs))]
    compared: list[Run] = [("compare", [*pair], 0) for pair in pairwise(steps)]
    assert outcomes(compared, tmp_path) == [f"{same} the same, others: []"] * len(compared)


def test_shared_heads_are_the_same_hugging_face_files_with_context_parallelism_and_without(
    tmp_path: Path,
) -> None:
    def exchange(folder: str, *how: str, what: str = "load and save") -> list[Run]:
        """The same on every mesh, each in a folder of its own."""
        return [
            (
                f"{what} the last repaired replicated",
                of(tmp_path / f"{folder}{index}", *how, "--checkpoint.last_save_model_only", **LLAMA, **mesh),
                ranks,
            )
            for index, (mesh, ranks) in enumerate(MESHES)
        ]

    def step(folder: str, index: int = 0) -> str:
        return str(tmp_path / f"{folder}{index}" / STEP)

    start = ("--checkpoint.initial_load_path",)
    runs: list[Run] = [
        exchange("ours", what="train and save")[0],
        *exchange("hf", "--checkpoint.last_save_in_hf", *start, step("ours")),
        *exchange("back", "--checkpoint.initial_load_in_hf", *start, step("hf")),
    ]
    assert outcomes(runs, tmp_path) == [""] * len(runs)
    compared: list[Run] = [("compare", [step("hf"), step("hf", index)], 0) for index in (1, 2)]
    compared += [("compare", [step("ours"), step("back", index)], 0) for index in (0, 1, 2)]
    assert outcomes(compared, tmp_path) == ["57 the same, others: []"] * len(compared)


@pytest.mark.long
def test_a_checkpoint_of_every_kind_of_model_is_its_own(tmp_path: Path) -> None:
    runs = [of(tmp_path / model, model=model, flavor=flavor, **ONE) for model, flavor in KINDS.items()]
    assert outcomes([("save", run, 1) for run in runs], tmp_path) == [""] * len(runs)
    assert [codes(("load", run, 1)) for run in runs] == [[]] * len(runs)
