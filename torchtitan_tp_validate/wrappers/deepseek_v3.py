"""Drop-in `parallelize_deepseekv3`: DeepSeek-V3 (torchtitan 0.2.x and 0.3.x)."""

from typing import Any

from torchtitan_tp_validate.wrappers.guard import drop_in
from torchtitan_tp_validate.wrappers.target import Target

TARGET = Target(
    name="parallelize_deepseekv3",
    functions=("parallelize_deepseekv3",),
    packages=(
        "torchtitan.models.deepseek_v3",
        "torchtitan.experiments.simple_fsdp.deepseek_v3",
        "torchtitan.experiments.compiler_toolkit.deepseek_v3",
        "torchtitan.experiments.graph_trainer.deepseek_v3",
    ),
)


def __getattr__(name: str) -> Any:
    return drop_in(TARGET, __name__, name)
