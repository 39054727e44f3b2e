"""How a rehearsal compares a gradient: relative to itself, or to the least that counts."""

from __future__ import annotations

import math

import pytest
import torch

from torchtitan_tp_validate.rehearsal.findings import TOLERANCE
from torchtitan_tp_validate.rehearsal.process import beside

pytestmark = pytest.mark.requires(torchtitan=("0.2.2", "0.3.0"))

LEAST = 1e-5
"""Of a model whose gradients have a norm of 1."""


@pytest.mark.parametrize(
    ("norm", "factor", "is_wrong"),
    [
        (1.0, 1.001, True),
        (1.0, 1.00001, False),
        # Below the least that counts: rounding, and a fault.
        (1e-7, 1.001, False),
        (1e-7, 2.0, True),
        (1e-8, 0.0, True),
        (1e-10, 2.0, False),
    ],
)
def test_rounding_of_a_tiny_gradient_is_let_alone_and_a_fault_is_not(
    norm: float, factor: float, is_wrong: bool
) -> None:
    wanted = torch.full((4,), norm / 2, dtype=torch.float64)
    seen = beside("w", factor * wanted, wanted, least=LEAST)
    assert (seen.distance > TOLERANCE) is is_wrong
    assert seen.factor == pytest.approx(factor)


def test_without_a_least_every_gradient_is_compared_with_itself() -> None:
    wanted = torch.full((4,), 1e-12)
    assert beside("w", 2 * wanted, wanted).distance == pytest.approx(1.0)


def test_a_gradient_where_there_should_be_none_is_wrong() -> None:
    assert beside("w", torch.ones(2), torch.zeros(2), least=LEAST).distance == math.inf
    assert beside("w", torch.zeros(2), torch.zeros(2), least=LEAST).distance == 0.0
