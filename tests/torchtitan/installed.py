"""What the installed line of torchtitan has, for tests that hold for every line."""

from __future__ import annotations

from torchtitan_tp_validate import registry
from torchtitan_tp_validate.releases import releases

HAS_CONFIG_TREES = registry.has_configs()
"""Models and jobs are trees of configs (0.3.x), and not model args and a ``JobConfig``."""

SPMD_BACKENDS = tuple(
    backend.name
    for line in releases()
    if bool(line.CONFIG_REGISTRY) is HAS_CONFIG_TREES
    for backend in line.SPMD_BACKENDS
)
