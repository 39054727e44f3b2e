"""Read the tensor parallel plans of the installed transformers, and write them into the shipped table.

For ``scripts/transformers_plans.py`` and the test that holds the table to the installed release. The table is
read by `torchtitan_tp_validate.releases.transformers_plans`, which says what is in it.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torchtitan_tp_validate.errors import TPPlanError
from torchtitan_tp_validate.releases.transformers_plans import (
    TPPlan,
    decode,
    plan_at,
    release,
    transformers_version,
)
from torchtitan_tp_validate.transformers_tp.audit import instantiate
from torchtitan_tp_validate.transformers_tp.model import effective_plan


@dataclass(frozen=True)
class ReleasePlans:
    """The plans of one transformers release.

    Attributes:
        release: major and minor.
        model_types: of the text decoder that a ``model_type`` has; empty where it has no plan.
        classes: of model classes that have a plan of their own, by ``model_type/class``.
    """

    release: tuple[int, int]
    model_types: Mapping[str, TPPlan]
    classes: Mapping[str, TPPlan]


def read_installed() -> ReleasePlans:
    """Return the plans of the installed transformers, asked of its own classes.

    Raises:
        TPPlanError: transformers is not installed.
    """
    version = transformers_version()
    if version is None:
        raise TPPlanError("transformers is not installed, so there are no plans to read.")
    configs = {cls.model_type: cls for cls in _config_classes()}
    return ReleasePlans(
        release(version),
        {kind: dict(text_plan(cls)) for kind, cls in sorted(configs.items())},
        dict(sorted(_class_plans())) if _class_plans_take_effect() else {},
    )


def text_plan(config_class: Any) -> TPPlan:
    """Return the plan of the text decoder that a config class has by default, empty when there is none."""
    try:
        text = config_class().get_text_config(decoder=True)
    except Exception:
        # The defaults of some are no model. What they inherit or declare is theirs all the same.
        text = config_class
    return text.base_model_tp_plan or {}


def with_release(content: Mapping[str, Any] | None, new: ReleasePlans) -> str:
    """Return the text of the table with one release's part replaced or added; the others stay.

    Args:
        content: what the file holds, None when there is none yet.
        new: the part.
    """
    parts = {} if content is None else {part.release: part for part in _parts(content)}
    parts[new.release] = new
    ordered = [parts[key] for key in sorted(parts)]
    plans: list[TPPlan] = []
    versions = [f"{major}.{minor}" for major, minor in sorted(parts)]
    model_types = _changes([part.model_types for part in ordered], plans)
    classes = _changes([part.classes for part in ordered], plans)
    lines = [f'"releases": {json.dumps(versions)}', f'"tp_plans": [\n{_lines(plans)}\n]']
    for name, changes in (("model_types", model_types), ("classes", classes)):
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(of_key)}" for key, of_key in changes.items())
        lines.append(f'"{name}": {{\n{rows}\n}}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _lines(plans: list[TPPlan]) -> str:
    return ",\n".join(json.dumps(plan) for plan in plans)


def _changes(
    of_releases: list[Mapping[str, TPPlan]], plans: list[TPPlan]
) -> dict[str, list[tuple[int, int | None]]]:
    """Name -> (index of a release, index of the plan from then on, None when it is gone)."""
    found: dict[str, list[tuple[int, int | None]]] = {}
    for name in sorted({name for of_release in of_releases for name in of_release}):
        before = None
        for index, of_release in enumerate(of_releases):
            plan = of_release.get(name)
            if plan == before and (plan is None) == (before is None):
                continue
            if plan is not None and plan not in plans:
                plans.append(plan)
            found.setdefault(name, []).append((index, None if plan is None else plans.index(plan)))
            before = plan
    return found


def _parts(content: Mapping[str, Any]) -> Iterator[ReleasePlans]:
    table = decode(content)
    for index, of in enumerate(table.releases):
        model_types, classes = (
            {name: plan for name in names if (plan := plan_at(names[name], index)) is not None}
            for names in (table.model_types, table.classes)
        )
        yield ReleasePlans(of, model_types, classes)


def _config_classes() -> Iterator[Any]:
    """Every config class that a ``config.json`` may name, and those nested in them."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    seen = set()

    def with_nested(cls: Any) -> Iterator[Any]:
        if cls in seen or not getattr(cls, "model_type", ""):
            return
        seen.add(cls)
        for nested in getattr(cls, "sub_configs", {}).values():
            if isinstance(nested, type):
                yield from with_nested(nested)
        yield cls

    # By name: other packages may register configs of their own under the same types.
    declared = []
    for kind, name in CONFIG_MAPPING_NAMES.items():
        module = importlib.import_module(f"transformers.models.{model_type_to_module_name(kind)}")
        declared.append(getattr(module, name, None) or getattr(transformers, name))
    # What a type itself declares comes last, so that it wins over a nested class of the same type.
    for cls in declared:
        yield from with_nested(cls)
    yield from (cls for cls in declared if getattr(cls, "model_type", ""))


def _class_plans_take_effect() -> bool:
    """Whether an instance follows the plan of its class; up to 5.13 it wipes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(num_hidden_layers=1, vocab_size=8, hidden_size=8, num_attention_heads=1)
    return "lm_head" in effective_plan(instantiate(LlamaForCausalLM, tiny))


def _class_plans() -> Iterator[tuple[str, TPPlan]]:
    import transformers

    for name in dir(transformers):
        if not re.search(r"For[A-Z]|LMHead", name) or name.startswith("AutoModel"):
            continue
        cls = getattr(transformers, name)
        plan = getattr(cls, "_tp_plan", None)
        config_class = getattr(cls, "config_class", None)
        if plan and config_class is not None:
            yield f"{config_class.model_type}/{name}", dict(plan)
