"""The tracer that the walks are held to by sees what it is to see."""

from __future__ import annotations

from types import SimpleNamespace as NS

import torchtitan_tp_validate as tpv
from tests.core.shapes import attention_layer, config_tree
from tests.core.walks import walk
from torchtitan_tp_validate import validate


def test_a_file_is_entered_with_what_was_made_of_the_value_and_seen_to_come_back() -> None:
    config, parallel_dims = config_tree(attention_layer(8, 2)), NS(tp=2)

    def call() -> None:
        tpv.valid_tp_degrees(config, parallel_dims, replicate_kv_heads=True)

    call()
    taken = walk(call, lambda _, value: value is parallel_dims)
    assert taken.files[:3] == ["validate.py", "degrees.py", "releases/__init__.py"]
    assert "plan.py" in taken.files  # by way of the Degrees
    assert not {"errors.py", "advice.py", "releases/reading.py"} & {*taken.files}
    # The valid degrees are found by reading the plan at others.
    assert "validate.py > plan.py > releases/__init__.py > plan.py: with_kv_replication" in taken.back


def test_a_walk_ends_where_it_is_told_to_and_leaves_out_where_another_begins() -> None:
    config, parallel_dims = config_tree(attention_layer(8, 2)), NS(tp=2)

    def call() -> None:
        tpv.validate_tp_compat(config, parallel_dims)

    call()
    asked = walk(call, lambda _, value: value is parallel_dims, until=validate.judge)
    assert asked.files == ["validate.py", "degrees.py"]
    left_out = walk(call, lambda _, value: value is parallel_dims, without=(validate.read_plan,))
    assert "plan.py" in left_out.files
    assert "releases/__init__.py" not in left_out.files
