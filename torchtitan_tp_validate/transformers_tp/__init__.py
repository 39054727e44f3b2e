"""Hugging Face transformers under its own (native) tensor parallelism: a guard, an audit and a fix of plans.

Nothing here is loaded with the package, and importing it loads neither torch nor transformers.
"""

from torchtitan_tp_validate.transformers_tp.audit import PlanAudit, audit_tp_plan
from torchtitan_tp_validate.transformers_tp.fix import PlanFix, ensure_lm_head_plan

__all__ = ["PlanAudit", "PlanFix", "audit_tp_plan", "ensure_lm_head_plan"]
