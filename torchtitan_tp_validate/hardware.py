"""Build a config on a machine without the GPU that it is for.

torchtitan asks for the GPU as it builds a low-precision config (float8, MXFP8, NVFP4) or one with the Flash
backend of FlexAttention. What such a config shards is no matter of the machine.

Source: ``tools/utils.py`` (``has_cuda_capability``), ``components/quantization`` and
``models/common/config_utils.py`` of torchtitan 0.3.0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

_ASKS = "has_cuda_capability"

Built = TypeVar("Built")


def build_for_its_hardware(build: Callable[[], Built]) -> tuple[Built, str]:
    """Return what ``build`` returns, and which GPU was taken for granted, in words; empty when none was.

    It runs a second time, as on that GPU, when the machine's own does not do. Only while it runs does
    torchtitan believe so.

    Raises:
        Exception: whatever ``build`` raises for another reason.
    """
    try:
        return build(), ""
    except ValueError:  # torchtitan's answer to the wrong GPU, and to much else
        with _any_gpu() as wanted:
            built = build()
    if not wanted:
        return built, ""
    major, minor = max(wanted)
    gpu = f"GPU of SM{major}{minor} or later"
    return built, f"the hardware: this machine has no {gpu}, and the config was judged as on one"


@contextmanager
def _any_gpu() -> Iterator[list[tuple[int, int]]]:
    """Have torchtitan believe in any NVIDIA GPU that it asks for; yields those that are not here."""
    original = getattr(sys.modules.get("torchtitan.tools.utils"), _ASKS, None)
    wanted: list[tuple[int, int]] = []

    def has_cuda_capability(major: int, minor: int) -> bool:
        if original is not None and not original(major, minor):
            wanted.append((major, minor))
        return True

    _bind(original, has_cuda_capability)
    try:
        yield wanted
    finally:
        # Modules that were imported meanwhile have taken it over by name.
        _bind(has_cuda_capability, original)


def _bind(old: Any, new: Any) -> None:
    """Put ``new`` in the place of ``old`` in every module that has it by its name."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and old is not None and vars(module).get(_ASKS) is old:
            setattr(module, _ASKS, new)
