"""What one process shows of repairs: which of them are made, and which parameters are trained then."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.forked import in_forks, run_module
from torchtitan_tp_validate import RunError, validate_job
from torchtitan_tp_validate.job import parse_command_line

_COUNT = """
import torch
import torch.distributed as dist
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.tools import utils

from torchtitan_tp_validate.hardware import build_for_its_hardware
from torchtitan_tp_validate.job import parse_command_line
from torchtitan_tp_validate.repairs import apply, undo

utils.device_type = parallel_dims.device_type = "cpu"
dist.init_process_group("fake", rank=0, world_size=2)
set_spmd_backend("spmd_types")
dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=2, pp=1, ep=1, world_size=2)
dims.build_mesh()
words = ["--module", "llama3", "--config", "llama3_debugmodel_float8_emulate_lora",
         "--parallelism.tensor_parallel_degree", "2", "--training.disable_cuda_graphs"]


def trained() -> tuple[int, int]:
    job, _ = build_for_its_hardware(lambda: parse_command_line(words))
    spec = job.model_spec
    spec.model.update_from_config(config=job)
    with torch.device("meta"):
        model = spec.model.build()
    before = sum(parameter.requires_grad for parameter in model.parameters())
    model = spec.parallelize_fn(
        model, parallel_dims=dims, training=job.training,
        parallelism=job.parallelism, compile_config=job.compile, ac_config=None, dump_folder="",
    )
    return before, sum(parameter.requires_grad for parameter in model.parameters())


stock = trained()
apply(["NUM007"])
mended = trained()
undo()
print(stock, mended, trained() == stock)
"""


_APPLY_ALL = """
from torchtitan_tp_validate import repairs
from torchtitan_tp_validate.repairs.patching import _standing

repairs.apply_all()
assert all(vars(owner)[name] is mended for owner, name, _, mended in _standing)
print(*sorted({f"{getattr(owner, '__name__', owner)}.{name}" for owner, name, *_ in _standing}))
"""
_REPAIRED = {
    "0.2.2": [
        "GptOssGroupedExperts.forward",
        "Llama3StateDictAdapter._permute",
        "Llama3StateDictAdapter._reverse_permute",
        "Llama4StateDictAdapter.to_hf",
        "TokenChoiceTopKRouter.init_weights",
        "Trainer.forward_backward_step",
        "_PipelineStageBase.backward_one_chunk",
        "_PipelineStageBase.backward_weight_one_chunk",
        "torchtitan.models.gpt_oss.infra.parallelize.apply_moe_ep_tp",
        "torchtitan.models.llama4.infra.parallelize.apply_moe_ep_tp",
    ],
    "0.3.0": [
        "AsyncCollectiveTensor.wait",
        "GptOssGroupedExperts.forward",
        "HFTransformerModel.init_states",
        "Llama3StateDictAdapter._permute",
        "Llama3StateDictAdapter._reverse_permute",
        "Module._spmd_distribute_state",
        "Qwen35StateDictAdapter.to_hf",
        "ScaledBiasRowwiseLinear.forward",
        "_PipelineStageBase.backward_one_chunk",
        "_PipelineStageBase.backward_weight_one_chunk",
        "_PipelineStageBase.get_bwd_send_ops",
        "torchtitan.components.optimizer.optimizer.init_optim_state",
        "torchtitan.components.optimizer.utils.init_optim_state",
    ],
}


@in_forks
@pytest.mark.requires(torchtitan=tuple(_REPAIRED))
def test_all_that_a_release_trains_wrong_is_repaired_at_once(tmp_path: Path) -> None:
    (tmp_path / "apply_all.py").write_text(_APPLY_ALL, encoding="utf-8")
    ended = run_module("apply_all", [], out=tmp_path, cwd=tmp_path)
    assert ended.returncode == 0, ended
    assert ended.output.splitlines()[-1].split() == _REPAIRED[version("torchtitan")]


@in_forks
@pytest.mark.requires(torchtitan="0.3")
def test_frozen_weights_under_lora_stay_frozen(tmp_path: Path) -> None:
    (tmp_path / "count_trained.py").write_text(_COUNT, encoding="utf-8")
    ended = run_module("count_trained", [], out=tmp_path, cwd=tmp_path)
    assert ended.returncode == 0, ended
    stock, mended, undone = eval(ended.output.splitlines()[-1].replace(") ", "), "))
    assert stock[0] < stock[1]
    assert mended == (stock[0], stock[0])
    assert undone


def _without_images() -> Any:
    """A job that trains a model with a vision encoder on text, and saves its optimizer."""
    from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader

    words = ["--module", "kimi_k2_7", "--config", "kimi_k2_5_debugmodel"]
    job = parse_command_line([*words, "--checkpoint.enable", "--checkpoint.interval", "5"])
    job.dataloader = HuggingFaceTextDataLoader.Config(dataset="c4")
    return job


@pytest.mark.requires(torchtitan="0.3.0")
def test_a_run_that_could_not_be_resumed_is_refused() -> None:
    with pytest.raises(RunError) as caught:
        validate_job(_without_images(), world_size=8)
    assert (
        str(caught.value)
        == """\
This run cannot work: the optimizer of a vision encoder is to be saved, and the data has no images.

  CKPT006 the optimizer of a vision encoder is to be saved, and the data has no images:
        a run of Qwen3.5 or Kimi that saves its optimizer trains on images, too.

Without this check: on text alone the vision encoder has no gradients, and none of its parameters a
  state in the optimizer, which is saved without them. A run that resumes from such a checkpoint dies
  as it loads: "Missing key in checkpoint state_dict: optimizer.state.vision_encoder...".
To change it: repair it (--repair); or go on (--allow CKPT006), and resume without the state of the
  optimizer (--checkpoint.exclude_from_loading optimizer).\
"""
    )
    validate_job(_without_images(), world_size=8, repair=True)


@pytest.mark.requires(torchtitan="0.3.0")
@pytest.mark.parametrize("what", ["no checkpoint", "the model alone", "images", "load only"])
def test_a_run_that_saves_no_optimizer_or_has_images_can_be_resumed(what: str) -> None:
    job = _without_images()
    if what == "no checkpoint":
        job.checkpoint.enable = False
    elif what == "the model alone":
        job.checkpoint.interval, job.checkpoint.last_save_model_only = job.training.steps, True
    elif what == "images":
        job.dataloader = parse_command_line(["--module", "qwen3_5", "--config", "qwen35_0_8b"]).dataloader
    else:
        job.checkpoint.load_only = True
    validate_job(job, world_size=8)
