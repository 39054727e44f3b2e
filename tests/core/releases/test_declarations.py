"""How config trees of other months of torchtitan's main declare their shardings."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType
from types import SimpleNamespace as NS
from typing import Any

import pytest

from torchtitan_tp_validate.degrees import Axis, Degrees
from torchtitan_tp_validate.errors import PlanError
from torchtitan_tp_validate.releases import config_tree, declarations, read_plan


def declaring(layout: Any) -> Any:
    return NS(sharding_config=NS(state_shardings={"weight": layout}))


def test_a_layout_of_main_until_june_2026_is_a_dict_of_placements() -> None:
    layout = {"dp_shard": NS(), "tp": NS(dim=1), "ep": NS(dim=0)}
    assert list(config_tree.cuts(declaring(layout))) == [(Axis.TP, "weight", 1), (Axis.EP, "weight", 0)]


def test_a_layout_of_no_known_kind_is_no_verdict_and_no_crash() -> None:
    with pytest.raises(PlanError, match=r"^Not validated: a SimpleNamespace does not say what it splits\.$"):
        list(config_tree.cuts(declaring(NS())))


@dataclass
class Parallelism:
    """Without ``spmd_backend``, as until June 2026."""

    tensor_parallel_degree: int = 1
    expert_parallel_degree: int = 1
    context_parallel_degree: int = 1
    pipeline_parallel_degree: int = 1


@dataclass
class WithBackend(Parallelism):
    spmd_backend: str = "spmd_types"


@dataclass
class Debug:
    moe_force_load_balance: bool = False


@dataclass
class OfApril:
    """A config tree of April 2026."""

    seen: Any = None

    def update_from_config(self, *, trainer_config: Any, **kwargs: Any) -> None:
        assert trainer_config.debug.moe_force_load_balance is False
        self.seen = trainer_config.parallelism


@dataclass
class Newer:
    """A config tree of 0.3.0."""

    seen: Any = None

    def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
        assert config.debug is None
        self.seen = config.parallelism


@pytest.mark.parametrize(
    ("tree", "known", "seen"),
    [
        (OfApril(), {"ParallelismConfig": Parallelism, "DebugConfig": Debug}, Parallelism()),
        (Newer(), {"ParallelismConfig": WithBackend}, WithBackend(spmd_backend="partial_dtensor")),
    ],
)
def test_a_tree_is_told_of_a_run_in_the_words_of_its_time(
    tree: Any, known: dict[str, Any], seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchtitan: Any = ModuleType("torchtitan")
    torchtitan.config = NS(TrainingConfig=NS, **known)
    monkeypatch.setitem(sys.modules, "torchtitan", torchtitan)
    declared = declarations.with_shardings(tree, Degrees(tp=4, spmd_backend="partial_dtensor"), None)
    assert (declared.seen, tree.seen) == (seen, None)


@dataclass
class Attention:
    """Of the first days of April 2026: a size is set as the model is built."""

    n_heads: int = 8
    n_kv_heads: int = 2
    head_dim: int | None = None
    dim: int = field(init=False)


Attention.__module__, Attention.__qualname__ = "torchtitan.models.common.attention", "GQAttention.Config"


@dataclass
class Layer:
    attention: Attention
    delta_net: None = None
    moe: None = None


def test_sizes_that_a_config_does_not_have_yet_cost_replication_and_no_verdict() -> None:
    plan = read_plan(NS(layers=[Layer(Attention()), Layer(Attention())]))
    assert plan.valid_degrees() == [1, 2]
    assert plan.replication_degrees == []
    attention = Attention()
    attention.dim = 64
    assert read_plan(NS(layers=[Layer(attention)])).replication_degrees == [4, 8]
