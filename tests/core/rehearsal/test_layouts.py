from __future__ import annotations

import pytest

from torchtitan_tp_validate.rehearsal.truth.explained import UNEXPLAINED, explain
from torchtitan_tp_validate.rehearsal.truth.layouts import (
    Layout,
    Row,
    axes_of,
    is_possible,
    layouts,
    pairs,
    pairs_of,
)


@pytest.mark.parametrize("line", ["0.2", "0.3"])
def test_the_layouts_hold_every_two_values_that_go_together(line: str) -> None:
    axes = axes_of(line)
    held = {pair for layout in layouts(line) for pair in pairs_of(layout, axes)}
    # Some layouts of a fault have values of their own.
    assert {pair for pair in held if all(value in axes[axis] for axis, value in pair)} == pairs(line)
    assert all(is_possible(line, layout) for layout in layouts(line))


@pytest.mark.parametrize("line", ["0.2", "0.3"])
def test_every_family_is_in_every_mesh_that_it_takes(line: str) -> None:
    meshes = {layout.mesh for layout in layouts(line) if layout.model == "llama3 8B"}
    assert meshes == {
        mesh for mesh in axes_of(line)["mesh"] if not mesh.startswith(("ep", "tp2 ep", "tp4 ep"))
    }


def test_a_layout_says_its_degrees() -> None:
    degrees = Layout("llama3 8B", "tp2 dp_shard2").degrees
    assert {axis for axis, degree in degrees.items() if degree == 2} == {"tp", "dp_shard"}


def row(verdict: str, outcome: str, **seen: str) -> Row:
    """One of torchtitan 0.2.x, in a pipeline."""
    fields = dict.fromkeys(("worst", "wrong", "stage", "error", "seconds"), "") | seen
    return Row(Layout("llama3 8B", "pp2"), verdict=verdict, outcome=outcome, **fields)


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (row("fits", "equal"), "agrees"),
        (row("TP001", "dies"), "agrees"),
        (row("NUM008", "differs"), "agrees"),
        (row("TP001", "equal"), UNEXPLAINED),
        (row("fits", "hangs"), UNEXPLAINED),
        (row("fits", "differs", wrong="norm.weight x 128.000"), UNEXPLAINED),
        (row("fits", "dies", error="RuntimeError: mat1 and mat2 shapes cannot be multiplied"), UNEXPLAINED),
        (
            Row(
                Layout("qwen3 debugmodel", "cp2"),
                *("fits", "dies", "", "", "", "RuntimeError: mat1 and mat2 shapes cannot be multiplied", ""),
            ),
            "cannot be rehearsed: the math kernel of a CPU, which is no ring, gives every CP rank the "
            "attention of the whole sequence",
        ),
    ],
)
def test_what_is_seen_is_explained_by_an_exact_reason_or_by_none(seen: Row, why: str) -> None:
    assert explain("0.2", seen) == why
