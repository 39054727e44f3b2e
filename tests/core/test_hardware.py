from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from torchtitan_tp_validate.hardware import build_for_its_hardware


def module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(attributes)
    return made


@pytest.fixture
def bound_by_name(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that has imported the capability check by name, on a machine without any GPU."""

    def has_cuda_capability(major: int, minor: int) -> bool:
        return (major, minor) < (8, 0)

    utils = module("torchtitan.tools.utils", has_cuda_capability=has_cuda_capability)
    user = module("quantization_of_somebody", has_cuda_capability=has_cuda_capability)
    monkeypatch.setitem(sys.modules, "torchtitan.tools.utils", utils)
    monkeypatch.setitem(sys.modules, "quantization_of_somebody", user)
    return user


def test_a_config_for_another_gpu_is_built_and_the_check_is_put_back(bound_by_name: ModuleType) -> None:
    original = bound_by_name.has_cuda_capability
    late = module("imported_by_the_build")

    def build() -> str:
        late.has_cuda_capability = bound_by_name.has_cuda_capability
        sys.modules["imported_by_the_build"] = late
        if not bound_by_name.has_cuda_capability(8, 9) or not bound_by_name.has_cuda_capability(10, 0):
            raise ValueError("MXFP8 is only supported on SM100 or later architectures")
        return "built"

    try:
        assert build_for_its_hardware(build) == (
            "built",
            "the hardware: this machine has no GPU of SM100 or later, and the config was judged as on one",
        )
    finally:
        sys.modules.pop("imported_by_the_build", None)
    utils = sys.modules["torchtitan.tools.utils"]
    assert bound_by_name.has_cuda_capability is utils.has_cuda_capability is original
    assert late.has_cuda_capability is original


def test_a_config_that_the_machine_can_build_takes_nothing_for_granted(bound_by_name: ModuleType) -> None:
    original = bound_by_name.has_cuda_capability
    assert build_for_its_hardware(lambda: bound_by_name.has_cuda_capability) == (original, "")


@pytest.mark.parametrize("error", [ValueError("no such flavor"), ImportError("torchao is not installed")])
def test_another_reason_is_told_as_it_is_and_the_check_is_put_back(
    bound_by_name: ModuleType, error: Exception
) -> None:
    original = bound_by_name.has_cuda_capability

    def build() -> None:
        bound_by_name.has_cuda_capability(9, 0)
        raise error

    with pytest.raises(type(error), match=str(error)):
        build_for_its_hardware(build)
    assert bound_by_name.has_cuda_capability is original


def test_without_torchtitan_nothing_is_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchtitan.tools.utils", raising=False)
    with pytest.raises(ValueError, match="wrong"):
        build_for_its_hardware(lambda: int("wrong"))
