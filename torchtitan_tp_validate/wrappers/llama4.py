"""Drop-in `parallelize_llama`: Llama 4 (torchtitan 0.2.x)."""

from torchtitan_tp_validate.wrappers.guard import drop_in

__getattr__ = drop_in(__name__)
