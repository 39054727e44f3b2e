"""Drop-in `parallelize_deepseekv3`: DeepSeek-V3 (torchtitan 0.2.x and 0.3.x)."""

from torchtitan_tp_validate.wrappers.guard import drop_in

__getattr__ = drop_in(__name__)
