"""What the installed line of torchtitan has, for tests that hold for every line."""

from __future__ import annotations

from torchtitan_tp_validate import registry
from torchtitan_tp_validate.identity import torchtitan_identity
from torchtitan_tp_validate.releases import nearest_line

RELEASE = torchtitan_identity().name
"""``0.3.0``, or ``main``."""

HAS_CONFIG_TREES = registry.has_configs()
"""Models and jobs are trees of configs (0.3.x and main), and not model args and a ``JobConfig``."""

LINE = nearest_line()
SPMD_BACKENDS = tuple(backend.name for backend in LINE.SPMD_BACKENDS) if LINE else ()
