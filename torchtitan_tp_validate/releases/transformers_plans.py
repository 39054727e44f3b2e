"""Transformers' own tensor parallel plans (its "tp_plan"), as data: what they cut of a model's attention.

A tp_plan maps modules, layer numbers as ``*``, to a parallel style. Two of them make the one that loading
follows: that of the text decoder's config class, found by its ``model_type``, and that of the model class,
found by ``architectures``. Those of the releases are in ``transformers_plans.json`` beside this file, which
``scripts/transformers_plans.py`` writes, so that a file is judged without torch and without transformers.

Source: ``PreTrainedConfig.base_model_tp_plan``, ``PreTrainedModel._tp_plan`` and ``post_init`` (from 5.15
``DistributedMixin.init_parallel_plans``) of transformers 5.2 to 5.24.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.releases.reading import shortened

TPPlan = Mapping[str, str]
"""Module or parameter name, layer numbers written as ``*``, -> the name of a parallel style."""

FILE = Path(__file__).with_suffix(".json")

_QUERY_PROJECTIONS = frozenset({"q_proj", "q_b_proj", "q_gate_proj", "kv_b_proj", "query", "wq"})
_KEY_VALUE_PROJECTIONS = frozenset({"k_proj", "v_proj", "key", "value", "wk", "wv"})
_FUSED_PROJECTIONS = frozenset({"qkv_proj", "query_key_value", "qkv", "c_attn", "Wqkv"})
# What a rule may name below the projection: a parameter, or the linear inside a wrapper.
_BELOW_A_PROJECTION = frozenset({"weight", "bias", "linear"})

# From here on loading raises; before, it shards nothing and says so in a warning.
_REFUSES_WITHOUT_PLAN = (5, 21)

Changes = Mapping[str, Sequence[tuple[int, TPPlan | None]]]
"""Name -> (index of a release, its plan from then on, None when the name is not there), oldest first."""


@functools.cache
def transformers_version() -> str | None:
    """Return the version of the installed transformers, or None when there is none."""
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, int]:
    """Major and minor of a version, e.g. (5, 14) of ``5.14.1`` and of ``5.14.0.dev0``."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


@dataclass(frozen=True)
class Table:
    """The tp_plans of several transformers releases.

    Attributes:
        releases: major and minor, ascending; of each, the last patch release.
        model_types: of the text decoder that a ``model_type`` has; empty where it has no plan.
        classes: of model classes that have a plan of their own, by ``model_type/class``.
    """

    releases: tuple[tuple[int, int], ...]
    model_types: Changes
    classes: Changes

    def of_model_type(self, name: str, index: int) -> TPPlan | None:
        """Return the plan of a text decoder, empty when it has none, None when the type is not known."""
        return plan_at(self.model_types.get(name, ()), index)

    def of_classes(self, model_type: str, index: int) -> dict[str, TPPlan]:
        """Return the plans of the classes of one model type that have one."""
        plans = {}
        for name, changes in self.classes.items():
            kind, _, cls = name.rpartition("/")
            if kind == model_type and (plan := plan_at(changes, index)) is not None:
                plans[cls] = plan
        return plans


@functools.cache
def load() -> Table:
    """Return the shipped table."""
    return decode(json.loads(FILE.read_text(encoding="utf-8")))


def decode(content: Mapping[str, Any]) -> Table:
    """Return the table that a file holds; every plan is in it once, and releases name it by its index."""
    plans = content["tp_plans"]

    def changes(name: str) -> Changes:
        return {
            key: [(index, None if plan is None else plans[plan]) for index, plan in of_key]
            for key, of_key in content[name].items()
        }

    return Table(
        tuple(release(version) for version in content["releases"]), changes("model_types"), changes("classes")
    )


def find_tp_plan(
    model: Any, config: Mapping[str, Any], text_parts: Sequence[Mapping[str, Any]]
) -> tuple[TPPlan, tuple[str, ...]]:
    """Return the tp_plan that loading this model would follow, and what to keep in mind about it.

    Args:
        model: a model, whose effective plan is taken; a config object, which may bring one; or neither.
        config: its content.
        text_parts: its text decoders in there; the config itself where nothing is nested.

    Raises:
        PlanError: there is no plan, or none is known.
    """
    if hasattr(model, "tp_plan"):
        plan = model.tp_plan or {}
        if not plan:
            raise _no_plan(config.get("model_type"), _installed() or _judged_by(load()))
        return plan, ()
    if hasattr(model, "base_model_tp_plan"):
        plan = model.get_text_config(decoder=True).base_model_tp_plan
        if plan:
            return plan, ()
    return _of_content(config, text_parts)


def split_by(tp_plan: TPPlan) -> set[str]:
    """Return the kinds of heads that a tp_plan cuts, by rule code: those whose projections are ``colwise``.

    Every other style leaves heads whole: the output is gathered, or the projection is on every rank.
    """
    split = set()
    for pattern, style in tp_plan.items():
        *parents, projection = (part for part in pattern.split(".") if part not in _BELOW_A_PROJECTION)
        in_attention = any("attn" in part or "attention" in part for part in parents)
        if style != "colwise" or not in_attention or any("linear" in part for part in parents):
            continue
        if projection in _QUERY_PROJECTIONS | _FUSED_PROJECTIONS:
            split.add("TP001")
        if projection in _KEY_VALUE_PROJECTIONS | _FUSED_PROJECTIONS:
            split.add("TP002")
    return split


def split_beside(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], set[str]]]:
    """Yield (name, config, kinds of heads) of what is cut beside the text decoder, e.g. a vision tower."""
    table = load()
    index = table.releases.index(_judged_by(table))
    for name, part in config.items():
        # Files of Qwen-VL and the like give their vision towers the type of the whole.
        if isinstance(part, Mapping) and isinstance(part.get("model_type"), str):
            if part["model_type"] == config.get("model_type"):
                continue
            plan = table.of_model_type(part["model_type"], index)
            if split := split_by(plan or {}):
                yield name, part, split


def _of_content(
    config: Mapping[str, Any], text_parts: Sequence[Mapping[str, Any]]
) -> tuple[TPPlan, tuple[str, ...]]:
    """Return the plan of a file: that of its class, and those of its text decoders."""
    brought = _merged(_brought(part) for part in text_parts)
    if brought:
        return brought, ()
    table = load()
    judged_by = _judged_by(table)
    index = table.releases.index(judged_by)
    kind = config.get("model_type")
    own = table.of_model_type(kind, index) if isinstance(kind, str) else None
    if own is None:
        raise _unknown(table, kind, judged_by)
    # A part without a type, or with a name that only remote code knows, is what its owner has by default.
    parts = (table.of_model_type(str(part.get("model_type")), index) for part in text_parts)
    plan = _merged(own if of_part is None else of_part for of_part in parts)
    of_classes = table.of_classes(str(kind), index)
    named = config.get("architectures")
    # A file that names no class is taken to be of one that generates; those of one type have equal plans.
    classes = named if isinstance(named, list) and named else [*of_classes][:1]
    plan = _merged((plan, *(of_classes.get(name, {}) for name in classes if isinstance(name, str))))
    if not plan:
        raise _no_plan(kind, judged_by)
    installed = _installed()
    if installed is None or installed == judged_by:
        return plan, ()
    return plan, (
        f"the plans of transformers {_text(installed)}, which is installed (those of {_text(judged_by)} were "
        "taken)",
    )


def _brought(part: Mapping[str, Any]) -> TPPlan:
    """Return the plan that a config brings itself, as remote code's may."""
    plan = part.get("base_model_tp_plan") or {}
    if not isinstance(plan, Mapping) or not all(isinstance(style, str) for style in plan.values()):
        raise PlanError(f"base_model_tp_plan must map modules to parallel styles, got {shortened(plan)}.")
    return plan


def _merged(plans: Iterable[TPPlan]) -> dict[str, str]:
    return {pattern: style for plan in plans for pattern, style in plan.items()}


def plan_at(changes: Sequence[tuple[int, TPPlan | None]], index: int) -> TPPlan | None:
    """Return what holds in the release of that index; None when nothing does."""
    return next((plan for since, plan in reversed(changes) if since <= index), None)


def _installed() -> tuple[int, int] | None:
    version = transformers_version()
    return None if version is None else release(version)


def _judged_by(table: Table) -> tuple[int, int]:
    """Return what is installed, else the newest; of a release that the table lacks, the one before it."""
    installed = _installed() or table.releases[-1]
    return max((known for known in table.releases if known <= installed), default=table.releases[0])


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


def _unknown(table: Table, model_type: Any, judged_by: tuple[int, int]) -> PlanError:
    if model_type is None:
        return PlanError("the config has no model_type, by which transformers finds a tensor parallel plan.")
    known = table.model_types.get(model_type, ()) if isinstance(model_type, str) else ()
    since = [_text(table.releases[index]) for index, plan in known if plan is not None]
    hint = (
        f"; {since[0]} is the first release that does"
        if since
        else ", so that its plan is unknown: a base_model_tp_plan in the config would tell it"
    )
    return PlanError(
        f"transformers {_text(judged_by)} does not know the model_type {shortened(model_type)}{hint}."
    )


def _no_plan(model_type: Any, judged_by: tuple[int, int]) -> PlanError:
    consequence = (
        "it refuses to load it with a tp_size above 1 unless DistributedConfig(tp_plan={...}) brings one."
        if judged_by >= _REFUSES_WITHOUT_PLAN
        else "it loads with any tp_size, and every rank holds all of it."
    )
    name = model_type if isinstance(model_type, str) else "this model"
    has_none = f"transformers {_text(judged_by)} has no tensor parallel plan for {name}"
    return PlanError(f"{has_none}: {consequence}")
