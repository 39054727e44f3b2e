"""Drop-in `parallelize_muse_glimmer`: Muse Glimmer (torchtitan 0.3.x)."""

from torchtitan_tp_validate.wrappers.guard import drop_in

__getattr__ = drop_in(__name__)
