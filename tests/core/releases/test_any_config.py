"""Whatever a config says under any name that is looked at: a plan or a PlanError, and nothing else."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torchtitan_tp_validate as tpv
from tests.core.releases.published import PUBLISHED
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.releases.huggingface import _TEXT_PARTS, Framework, read
from torchtitan_tp_validate.validate import compat_error

JUNK: tuple[Any, ...] = (
    *(0, 1, 3, -1, True, False, 0.5, float("nan"), float("inf"), 10**9, 10**5000),
    *("", "abc", "M*-E", "multiquery", "\ud800", "a\nb\x1b[31m"),
    *([], [None], [0, 1], [1, "x"], [[1]], [{}], ["full_attention"], ["warp\n"], ()),
    *({}, {"": 0}, {"x": {}}, {"0": 1}, {"0": {"num_key_value_heads": []}}, {"inf": {}}),
)


_WITHIN_TEXT = tuple(f"{part}." for part in _TEXT_PARTS)


class Probe(Mapping[str, Any]):
    """A config that has something under every name, and notes the paths that it is asked for."""

    def __init__(self, paths: set[str], chance: random.Random, where: str = "") -> None:
        self._paths, self._chance, self._where = paths, chance, where
        self._said: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        self._paths.add(f"{self._where}{name}")
        if name not in self._said:
            nested = Probe(self._paths, self._chance, f"{name}.")
            self._said[name] = self._chance.choice((*(None,) * 80, 4, [1, 0, 1, 0], nested, nested))
        return self._said[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._said))

    def __len__(self) -> int:
        return len(self._said)


def paths_looked_at() -> list[str]:
    """The names that the reader asks a config for, and those that it asks what is inside for."""
    chance = random.Random(0)
    paths: set[str] = set()
    for run, kind in enumerate(["llama", "kimi_k25", "qwen3_5_moe", "samba", "of_someone"] * 400):
        probe = Probe(paths, chance)
        if run % 4:  # most of the rest is only looked at where these are right
            probe._said |= {"model_type": kind, "num_attention_heads": 8, "num_hidden_layers": 4}
        if run % 2:
            vision = Probe(paths, chance, "vision_config.")
            probe._said |= {"num_experts": 4, "moe_intermediate_size": 8, "vision_config": vision}
        try:
            read(probe, None, Degrees(tp=2, ep=2), framework=Framework.TORCHTITAN)
        except tpv.PlanError:
            continue
    # What is within a text decoder is spoilt where a file has it.
    return sorted(path for path in paths if path.count(".") < 2 and not path.startswith(_WITHIN_TEXT))


def outcome(config: Any, framework: Framework = Framework.TORCHTITAN) -> str:
    """Read a config as anybody may: what is wrong with it; any other exception ends the test."""
    degrees = Degrees(tp=2, ep=2, replicate_kv_heads=True)
    try:
        plan = read(config, None, degrees, framework=framework)
    except tpv.PlanError as error:
        return str(error)
    assert plan.n_layers
    compat_error(plan, degrees)
    return ""


def is_a_reason(message: str) -> bool:
    return not message or (message.startswith("Not validated: ") and message.isprintable())


BASES = ("Llama-3.1-8B", "Qwen3.5-35B-A3B", "Kimi-K2.5", "Jamba-v0.1")


def test_any_value_under_any_name_gives_a_plan_or_a_plan_error() -> None:
    paths = paths_looked_at()
    assert len(paths) > 120
    for path in ("linear_attn_config.full_attn_layers", "n_experts", "vision_config.vt_num_attention_heads"):
        assert path in paths
    for path, name, value in product(paths, BASES, JUNK):
        config = copy.deepcopy(PUBLISHED[name].config)
        *parents, last = path.split(".")
        part = config.get("text_config", config)
        for parent in parents:
            part[parent] = part[parent] if isinstance(part.get(parent), dict) else {}
            part = part[parent]
        part[last] = value
        message = outcome(config)
        assert is_a_reason(message), (path, value, message)


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_real_config_with_two_values_spoilt_gives_a_plan_or_a_plan_error(data: st.DataObject) -> None:
    config = copy.deepcopy(PUBLISHED[data.draw(st.sampled_from(sorted(PUBLISHED)))].config)
    for _ in range(2):
        part = config
        name = data.draw(st.sampled_from(sorted(part)))
        while isinstance(part[name], dict) and part[name] and data.draw(st.integers(0, 3)):
            part = part[name]
            name = data.draw(st.sampled_from(sorted(part)))
        part[name] = data.draw(st.sampled_from(JUNK))
    assert is_a_reason(outcome(config, data.draw(st.sampled_from(list(Framework)))))


@pytest.mark.parametrize("framework", Framework)
@pytest.mark.parametrize("name", [3, None, (1, 2), b"n_head"])
def test_names_that_are_no_text_are_no_harm(framework: Framework, name: Any) -> None:
    content: dict[Any, Any] = {
        name: 4,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "model_type": "llama",
    }
    assert read(content, content, Degrees(tp=2), framework=framework).valid_degrees() == [1, 2, 4, 8]
    with pytest.raises(tpv.PlanError):
        read({name: 4}, None, Degrees(tp=2), framework=framework)


def test_a_value_that_cannot_be_shown_is_still_a_reason() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    content = {"num_attention_heads": Broken(), "num_hidden_layers": 2}
    with pytest.raises(tpv.PlanError, match="got a value that cannot be shown"):
        read(content, content, Degrees(tp=2))
