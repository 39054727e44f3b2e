"""Drop-in `parallelize_gptoss`: gpt-oss (torchtitan 0.2.1 and later)."""

from typing import Any

from torchtitan_tp_validate.wrappers.guard import drop_in
from torchtitan_tp_validate.wrappers.target import Target

TARGET = Target(
    name="parallelize_gptoss",
    functions=("parallelize_gptoss",),
    packages=("torchtitan.models.gpt_oss", "torchtitan.experiments.gpt_oss"),
)


def __getattr__(name: str) -> Any:
    return drop_in(TARGET, __name__, name)
