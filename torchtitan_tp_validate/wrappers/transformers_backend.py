"""Drop-in `parallelize_hf_transformers`: Hugging Face models in torchtitan 0.2.1 and later."""

from typing import Any

from torchtitan_tp_validate.wrappers.guard import drop_in
from torchtitan_tp_validate.wrappers.target import Target

TARGET = Target(
    name="parallelize_hf_transformers",
    functions=("parallelize_hf_transformers",),
    packages=("torchtitan.experiments.transformers_modeling_backend",),
)


def __getattr__(name: str) -> Any:
    return drop_in(TARGET, __name__, name)
