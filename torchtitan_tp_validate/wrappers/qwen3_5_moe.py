"""Drop-in `parallelize_qwen3_5_moe`: Qwen3.5, dense and MoE (0.3.x: `parallelize_qwen3_5`)."""

from torchtitan_tp_validate.wrappers.guard import drop_in

__getattr__ = drop_in(__name__)
