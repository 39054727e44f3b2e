"""Drop-in `parallelize_kimi_k2_5`: Kimi K2 (torchtitan 0.3.x)."""

from typing import Any

from torchtitan_tp_validate.wrappers.guard import drop_in
from torchtitan_tp_validate.wrappers.target import Target

TARGET = Target(
    name="parallelize_kimi_k2_5",
    functions=("parallelize_kimi_k2_5",),
    packages=("torchtitan.models.kimi_k2_7",),
)


def __getattr__(name: str) -> Any:
    return drop_in(TARGET, __name__, name)
