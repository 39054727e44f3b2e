"""Packages that some of torchtitan's models import and that nothing has to install."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

_OF_QWEN3_5 = ("fla", "torchvision")

missing_for_qwen3_5 = [package for package in _OF_QWEN3_5 if find_spec(package) is None]

needs_qwen3_5 = pytest.mark.skipif(
    bool(missing_for_qwen3_5), reason=f"torchtitan's qwen3_5 imports {' and '.join(missing_for_qwen3_5)}"
)
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="low precision needs torchao")
