"""Complete a transformers tensor parallel plan that forgets the output head.

The rule goes into the plan of the instance, right after the `post_init` that builds it. That takes effect
in every release, where a rule on the class does not (up to 5.13.1 the instance's plan starts empty), and
only an instance knows whether its output head is tied to its embedding.

A tied pair is sharded together or not at all: a sharded head on a whole embedding doubles the logits up to
5.14.1, and a whole head on a sharded embedding fails in forward from 5.15 on.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from torchtitan_tp_validate.errors import InstallWarning, TPPlanError
from torchtitan_tp_validate.transformers_tp.model import output_head, rule_of

HEAD_STYLE = "colwise_gather_output"
"""What transformers gives output heads: rows split, logits gathered."""
EMBEDDING_STYLE = "embedding_rowwise"
"""What it gives input embeddings from 5.15 on: the vocabulary split, partial look-ups summed."""

# Instance -> the rules that were added to its plan.
_added: weakref.WeakKeyDictionary[Any, dict[str, str]] = weakref.WeakKeyDictionary()


class PlanFix:
    """A plan, or the plans of a class, completed until `undo`. Also a context manager that undoes.

    Attributes:
        rules: the rules that were added to a model's plan, empty when it was complete; of a class they are
            not known before its instances are.
    """

    def __init__(self, rules: Mapping[str, str], undo: Callable[[], None]) -> None:
        self.rules = dict(rules)
        self._undo: Callable[[], None] | None = undo

    def undo(self) -> None:
        """Put things back as they were, except for what somebody else changed since. Again: nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> PlanFix:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def ensure_lm_head_plan(model_or_class: Any) -> PlanFix:
    """Have tensor parallelism shard the output head, and the embedding that it is tied to.

    Does nothing to a model whose plan has the rules, whose plan is empty or that has no output head.

    Args:
        model_or_class: a model that is not distributed yet, or a class: then every instance made of it (or
            of a class derived from it) from now on, by `from_pretrained` too. ``PreTrainedModel`` means all.

    Raises:
        TPPlanError: the model is distributed already, when a rule comes too late.
    """
    if isinstance(model_or_class, type):
        return _fix_class(model_or_class)
    if getattr(model_or_class, "_device_mesh", None) is not None:
        raise TPPlanError(
            f"This {type(model_or_class).__name__} is distributed already: a rule for its output head must "
            "be there before it is loaded. Use install(fix_tp_plan=True), or pass the class."
        )
    rules = _complete(model_or_class)
    return PlanFix(rules, lambda: withdraw(model_or_class, rules))


def missing_rules(model: Any) -> dict[str, str]:
    """Return the rules that its plan needs so that the output head is sharded, and sharded correctly."""
    plan = model._tp_plan
    head = output_head(model) if plan else None
    if head is None:
        return {}
    wanted = {head.name: HEAD_STYLE, **dict.fromkeys(head.tied_to, EMBEDDING_STYLE)}
    return {name: style for name, style in wanted.items() if rule_of(name, plan) is None}


def added_rules(model: Any) -> dict[str, str]:
    """Return the rules that were added to a model's plan, also by way of the models inside it."""
    return {
        f"{prefix}.{name}" if prefix else name: style
        for prefix, module in model.named_modules()
        for name, style in _added.get(module, {}).items()
    }


def withdraw(model: Any, rules: Mapping[str, str]) -> None:
    """Take rules out of a model's plan again, unless they have been changed since."""
    for name, style in rules.items():
        if model._tp_plan.get(name) == style:
            del model._tp_plan[name]
    _added.pop(model, None)


def _complete(model: Any) -> dict[str, str]:
    rules = missing_rules(model)
    model._tp_plan.update(rules)
    if rules:
        _added[model] = rules
    return rules


def _fix_class(cls: Any) -> PlanFix:
    original = cls.post_init
    own = "post_init" in vars(cls)
    fix: PlanFix

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        if fix._undo is not None:
            _complete(self)

    def undo() -> None:
        if vars(cls).get("post_init") is not post_init:
            return
        if own:
            cls.post_init = original
        else:
            del cls.post_init

    fix = PlanFix({}, undo)
    cls.post_init = post_init
    return fix


def settle(model: Any, tp: int) -> None:
    """Where plain tensors cannot be split as the completed plan says, leave the output head whole after all.

    For the releases up to 5.15, and called when the degree is known. They refuse a head of a vocabulary that
    does not divide, take the wrong rows of such an embedding, and fail on an embedding whose padding index
    is beyond the first rank's rows. A tied pair loses both rules, transformers' own too: half of them
    would double the logits.
    """
    head = output_head(model)
    added = added_rules(model)
    if head is None or not added:
        return
    rows = head.module.weight.shape[0]
    reason = ""
    if rows % tp:
        reason = f"{tp} ranks cannot share its {rows} rows evenly"
    for name in head.tied_to:
        padding = getattr(model.get_submodule(name), "padding_idx", None)
        if padding is not None and padding >= rows // tp:
            reason = (
                reason or f"padding_idx {padding} of {name} is not among the first rank's {rows // tp} rows"
            )
    if not reason:
        return
    dropped = {head.name, *head.tied_to} if head.tied_to else {*added}
    for name in dropped:
        model._tp_plan.pop(name, None)
    warnings.warn(
        f"The output head {head.name} of {type(model).__name__} stays whole on every rank: {reason}, which "
        "this transformers release needs.",
        InstallWarning,
        stacklevel=3,
    )
