"""Drop-in `parallelize_llama`: Llama 3 (torchtitan 0.2.x and 0.3.x)."""

from typing import Any

from torchtitan_tp_validate.wrappers.guard import drop_in
from torchtitan_tp_validate.wrappers.target import Target

TARGET = Target(
    name="parallelize_llama",
    functions=("parallelize_llama",),
    packages=(
        "torchtitan.models.llama3",
        "torchtitan.experiments.simple_fsdp.llama3",
        "torchtitan.experiments.compiler_toolkit.llama3",
        "torchtitan.experiments.graph_trainer.llama3",
    ),
)


def __getattr__(name: str) -> Any:
    return drop_in(TARGET, __name__, name)
