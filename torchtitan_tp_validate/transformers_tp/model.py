"""What a live transformers model says of itself: its effective plan, its output head and what it is tied to.

A *model* here is an instance, on the meta device for all that matters: up to transformers 5.13.1 the
instance's plan wipes the plan of its class, so that a class alone proves nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchtitan_tp_validate.releases.transformers_plans import TPPlan


@dataclass(frozen=True)
class OutputHead:
    """The linear that turns hidden states into logits.

    Attributes:
        name: its module name, e.g. ``lm_head``.
        module: the linear itself; its weight has shape (vocab_size, hidden_size).
        tied_to: names of the modules that share its weight, the input embedding as a rule.
    """

    name: str
    module: Any
    tied_to: tuple[str, ...]


def effective_plan(model: Any) -> TPPlan:
    """Return the plan that loading it with ``tp_plan="auto"`` would follow; empty when it has none.

    Source: ``PreTrainedModel.tp_plan`` (from 5.15 ``DistributedMixin.tp_plan``).
    """
    return model.tp_plan or {}


def rule_of(name: str, plan: TPPlan) -> str | None:
    """Return the style that the plan gives the weight of a module, or None when every rank holds all of it.

    A rule may name the parameter itself or its module, layer numbers as ``*``.

    Source: ``_get_parameter_tp_plan`` (integrations/tensor_parallel.py up to 5.15), ``_get_parameter_plan``
    (distributed/parallel_utils.py from 5.20).
    """
    module = wildcard(name)
    return plan.get(f"{module}.weight", plan.get(module))


def wildcard(name: str) -> str:
    """Return the name with its layer numbers as ``*``, as plans write it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def output_head(model: Any) -> OutputHead | None:
    """Return the output head that the model itself names; None for none, or several, as audio codecs have."""
    module = model.get_output_embeddings()
    if getattr(module, "weight", None) is None:
        return None
    name = next((name for name, m in model.named_modules() if m is module), None)
    if name is None:
        return None
    return OutputHead(name, module, _tied_to(f"{name}.weight", model.all_tied_weights_keys))


def _tied_to(weight: str, ties: Mapping[str, str]) -> tuple[str, ...]:
    """Return what shares a weight, of ``PreTrainedModel.all_tied_weights_keys`` (target -> source).

    The parameters themselves are no help: `from_pretrained` ties them after the model is distributed.
    """
    source = ties.get(weight, weight)
    sharing = dict.fromkeys((source, *(target for target, of in ties.items() if of == source)))
    return tuple(name.rpartition(".")[0] for name in sharing if name != weight)
