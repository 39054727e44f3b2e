"""Real configs: what their makers published, against degrees that were worked out by hand."""

from __future__ import annotations

import pytest

import torchtitan_tp_validate as tpv
from tests.core.releases.published import NOT_A_MODEL_OF_HEADS, PUBLISHED
from torchtitan_tp_validate.degrees import Degrees
from torchtitan_tp_validate.releases.huggingface import Framework, read


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_allows_the_degrees_worked_out_by_hand(name: str) -> None:
    config = PUBLISHED[name].config
    plan = read(config, config, Degrees(tp=1), framework=Framework.TORCHTITAN)
    assert " ".join(map(str, plan.valid_degrees())) == PUBLISHED[name].degrees


def test_the_families_are_many_and_their_counts_differ() -> None:
    families = {entry.config.get("model_type", name) for name, entry in PUBLISHED.items()}
    assert len(families) >= 60
    assert len({entry.degrees for entry in PUBLISHED.values()}) >= 15


@pytest.mark.parametrize("name", NOT_A_MODEL_OF_HEADS)
def test_a_file_without_heads_is_told_what_it_is(name: str) -> None:
    config, message = NOT_A_MODEL_OF_HEADS[name]
    for framework in Framework:
        with pytest.raises(tpv.PlanError) as caught:
            read(config, config, Degrees(tp=1), framework=framework)
        assert str(caught.value) == f"Not validated: {message}"
