"""Drop-in `parallelize_qwen3_5_moe`: Qwen3.5, dense and MoE.

torchtitan 0.3.x calls it `parallelize_qwen3_5`; the name is that of upstream pull request #2545.
"""

from typing import Any

from torchtitan_tp_validate.wrappers.guard import drop_in
from torchtitan_tp_validate.wrappers.target import Target

TARGET = Target(
    name="parallelize_qwen3_5_moe",
    functions=("parallelize_qwen3_5", "parallelize_qwen3_5_moe"),
    packages=("torchtitan.models.qwen3_5", "torchtitan.models.qwen3_5_moe"),
)


def __getattr__(name: str) -> Any:
    return drop_in(TARGET, __name__, name)
