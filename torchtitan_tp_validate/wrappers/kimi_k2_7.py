"""Drop-in `parallelize_kimi_k2_5`: Kimi K2 (torchtitan 0.3.x)."""

from torchtitan_tp_validate.wrappers.guard import drop_in

__getattr__ = drop_in(__name__)
