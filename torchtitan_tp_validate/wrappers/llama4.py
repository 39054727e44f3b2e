"""Drop-in `parallelize_llama`: Llama 4 (torchtitan 0.2.x; gone in 0.3.0)."""

from typing import Any

from torchtitan_tp_validate.wrappers.guard import drop_in
from torchtitan_tp_validate.wrappers.target import Target

TARGET = Target(
    name="parallelize_llama",
    functions=("parallelize_llama",),
    packages=("torchtitan.models.llama4",),
)


def __getattr__(name: str) -> Any:
    return drop_in(TARGET, __name__, name)
