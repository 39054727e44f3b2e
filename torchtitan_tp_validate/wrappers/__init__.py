"""Drop-in parallelize functions, a file per model family, and the table of all of them."""

from torchtitan_tp_validate.locate import Target
from torchtitan_tp_validate.models import MODELS

TARGETS: dict[str, Target] = {
    family.name: Target(name=family.drop_in, functions=family.functions, packages=family.packages)
    for family in MODELS
}
"""Wrapper module name -> what it guards."""
