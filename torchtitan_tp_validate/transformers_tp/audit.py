"""What a transformers model's tensor parallel plan leaves whole on every rank, though the model is sharded.

Judged on an instance on the meta device, which costs no memory: the plan of the class may never take effect
(transformers 5.0 to 5.13.1 wipe it), and only an instance has the ties between its weights.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torchtitan_tp_validate.errors import TPPlanError
from torchtitan_tp_validate.releases.transformers_plans import TPPlan, transformers_version
from torchtitan_tp_validate.transformers_tp.model import (
    OutputHead,
    effective_plan,
    output_head,
    rule_of,
    wildcard,
)

_SUFFIXES = ("ForCausalLM", "ForConditionalGeneration")


@dataclass(frozen=True)
class Linear:
    """Linears of one name, layer numbers as ``*``, that every rank holds whole.

    Attributes:
        name: e.g. ``model.visual.blocks.*.mlp.linear_fc1``.
        count: how many of them there are.
        shape: of one weight, (out_features, in_features).
        bytes_per_rank: of all of them together, in the dtype of the instance.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    bytes_per_rank: int


@dataclass(frozen=True)
class HeadAudit:
    """The output head of a model.

    Attributes:
        name: its module name, e.g. ``lm_head``.
        shape: (vocab_size, hidden_size).
        rule: the style that the effective plan gives it, or None when every rank holds all of it.
        tied_to: the modules that share its weight.
        embedding_rule: the style that the plan gives the first of those.
        bytes_per_rank: of the whole weight, in the dtype of the instance; a rank of ``tp`` could do with
            this over ``tp``.
    """

    name: str
    shape: tuple[int, ...]
    rule: str | None
    tied_to: tuple[str, ...]
    embedding_rule: str | None
    bytes_per_rank: int

    @property
    def consequence(self) -> str:
        """What loading it under this plan does, as measured; empty when nothing is wrong with it."""
        if not self.tied_to:
            return "" if self.rule else "every rank holds all of it"
        if self.rule and not self.embedding_rule:
            return (
                "tied to a whole embedding: logits tp times too wide "
                "(silently up to 5.14.1; later the forward pass fails)"
            )
        if self.embedding_rule and not self.rule:
            return "tied to a sharded embedding: the forward pass fails"
        return "" if self.rule else "tied; every rank holds all of it"


@dataclass(frozen=True)
class PlanAudit:
    """What the effective plan of one model does.

    Attributes:
        model: the class.
        transformers: the release.
        rules: how many rules its effective plan has; with none, nothing of the model is sharded.
        head: its output head, or None when it names none.
        linears: the other linears that every rank holds whole though the plan shards a smaller one, by
            bytes, largest first.
    """

    model: str
    transformers: str
    rules: int
    head: HeadAudit | None
    linears: tuple[Linear, ...]

    @property
    def head_left_whole(self) -> bool:
        """Whether the plan shards the model and forgets its output head."""
        return bool(self.rules and self.head and not self.head.rule)

    @property
    def fails(self) -> bool:
        """Whether loading it under this plan gives wrong logits, or none: a tied pair is sharded by half."""
        return bool(
            self.head and self.head.tied_to and bool(self.head.rule) != bool(self.head.embedding_rule)
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        head = self.head and {**asdict(self.head), "consequence": self.head.consequence}
        return {**asdict(self), "head": head, "head_left_whole": self.head_left_whole, "fails": self.fails}


@dataclass(frozen=True)
class NotAudited:
    """A class that no instance could be made of, so that nothing is known.

    Attributes:
        model: the class.
        reason: what making one raised.
    """

    model: str
    reason: str


def audit_tp_plan(model_or_class: Any, config: Any = None) -> PlanAudit:
    """Return what the tensor parallel plan of a transformers model leaves whole on every rank.

    Args:
        model_or_class: a model, or a class of which an instance is made on the meta device.
        config: the configuration to make it with; the default one of the class by default.

    Raises:
        TPPlanError: no instance could be made of the class.
    """
    model = instantiate(model_or_class, config) if isinstance(model_or_class, type) else model_or_class
    plan = effective_plan(model)
    head = output_head(model)
    return PlanAudit(
        model=type(model).__name__,
        transformers=transformers_version() or "of unknown version",
        rules=len(plan),
        head=None if head is None else _head(head, plan),
        linears=tuple(_linears(model, plan, head)),
    )


def instantiate(cls: Any, config: Any = None) -> Any:
    """Return an instance on the meta device: modules, names, ties and plans, but no memory.

    Raises:
        TPPlanError: making it, or its default configuration, raised.
    """
    import torch
    from transformers.initialization import no_init_weights

    quiet = io.StringIO()
    try:
        # What a default configuration makes its class say is of no use to anybody.
        with warnings.catch_warnings(), contextlib.redirect_stderr(quiet), _errors_only():
            warnings.simplefilter("ignore")
            with torch.device("meta"), no_init_weights():
                return cls(cls.config_class() if config is None else config)
    except Exception as error:
        # Any class of some hundred may fail in its own way, and each failure is reported as such.
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise TPPlanError(
            f"Not audited: no {cls.__name__} could be made of "
            f"{'its default configuration' if config is None else 'this configuration'}: "
            f"{type(error).__name__}: {first_line}"
        ) from error


def audited_classes() -> list[str]:
    """Return every generating class of the installed transformers, by name."""
    import transformers

    names = (name for name in dir(transformers) if name.endswith(_SUFFIXES))
    return sorted(name for name in names if not name.startswith("AutoModel"))


def audit_installed(names: Iterable[str]) -> Iterator[PlanAudit | NotAudited]:
    """Audit classes of the installed transformers, each with its default configuration.

    Args:
        names: of the classes, as `audited_classes` lists them.

    Raises:
        TPPlanError: transformers has no class of that name.
    """
    import transformers

    for name in names:
        cls = getattr(transformers, name, None)
        if not isinstance(cls, type):
            raise TPPlanError(f"transformers {transformers_version()} has no class {name}.")
        if not hasattr(cls, "config_class"):
            yield NotAudited(name, "it stands for a package that is not installed here")
            continue
        try:
            yield audit_tp_plan(cls)
        except TPPlanError as error:
            yield NotAudited(name, str(error).partition("configuration: ")[2])


def _head(head: OutputHead, plan: TPPlan) -> HeadAudit:
    weight = head.module.weight
    return HeadAudit(
        name=head.name,
        shape=tuple(weight.shape),
        rule=rule_of(head.name, plan),
        tied_to=head.tied_to,
        embedding_rule=rule_of(head.tied_to[0], plan) if head.tied_to else None,
        bytes_per_rank=weight.numel() * weight.element_size(),
    )


def _linears(model: Any, plan: TPPlan, head: OutputHead | None) -> Iterator[Linear]:
    import torch

    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    sharded = [m.weight.numel() for name, m in linears if rule_of(name, plan)]
    if not sharded:
        return
    whole: dict[tuple[str, tuple[int, ...]], list[Any]] = {}
    for name, module in linears:
        is_head = head is not None and module is head.module
        if not is_head and not rule_of(name, plan) and module.weight.numel() > min(sharded):
            whole.setdefault((wildcard(name), tuple(module.weight.shape)), []).append(module.weight)
    found = [
        Linear(name, len(weights), shape, sum(w.numel() * w.element_size() for w in weights))
        for (name, shape), weights in whole.items()
    ]
    yield from sorted(found, key=lambda linear: -linear.bytes_per_rank)


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
