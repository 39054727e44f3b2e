"""Drop-in `parallelize_gptoss`: gpt-oss (torchtitan 0.2.1 and later)."""

from torchtitan_tp_validate.wrappers.guard import drop_in

__getattr__ = drop_in(__name__)
