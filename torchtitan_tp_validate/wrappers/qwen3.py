"""Drop-in `parallelize_qwen3`: Qwen3, dense and MoE (torchtitan 0.2.x and 0.3.x)."""

from typing import Any

from torchtitan_tp_validate.wrappers.guard import drop_in
from torchtitan_tp_validate.wrappers.target import Target

TARGET = Target(
    name="parallelize_qwen3",
    functions=("parallelize_qwen3",),
    packages=(
        "torchtitan.models.qwen3",
        "torchtitan.experiments.rl.unified",
        "torchtitan.experiments.graph_trainer.qwen3",
    ),
)


def __getattr__(name: str) -> Any:
    return drop_in(TARGET, __name__, name)
