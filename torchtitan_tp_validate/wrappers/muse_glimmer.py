"""Drop-in `parallelize_muse_glimmer`: Muse Glimmer (torchtitan 0.3.x)."""

from typing import Any

from torchtitan_tp_validate.wrappers.guard import drop_in
from torchtitan_tp_validate.wrappers.target import Target

TARGET = Target(
    name="parallelize_muse_glimmer",
    functions=("parallelize_muse_glimmer",),
    packages=(
        "torchtitan.models.muse_glimmer",
        "torchtitan.experiments.graph_trainer.muse_glimmer",
    ),
)


def __getattr__(name: str) -> Any:
    return drop_in(TARGET, __name__, name)
