"""Above n_kv_heads every family is refused on every rank, before anything is touched.

Heads are written n_heads/n_kv_heads. What the refusals prevent is in test_stock_dies.py; how a refused job
ends in test_launcher.py.
"""

from __future__ import annotations

import pytest

from tests.torchrun.conftest import ResultOf
from torchtitan_tp_validate.rehearsal.cases import Case
from torchtitan_tp_validate.rehearsal.models import installed_line

FAMILIES = installed_line().FAMILIES
HEADLINES = {
    "8/2": "Tensor parallel degree (4) must divide n_kv_heads (2).",  # twice as many ranks as KV heads
    "12/6": "Tensor parallel degree (4) must divide n_kv_heads (6).",  # more KV heads than ranks, uneven
    "6/6": "Tensor parallel degree (4) must divide n_heads (6).",  # query heads uneven too
}
# Which heads are refused is no matter of the guard: each guard once, each head count once.
GUARDED = [
    ("8/2", "wrapper"),
    ("8/2", "install"),
    ("8/2", "install-late"),
    ("12/6", "wrapper"),
    ("6/6", "install"),
]


def above_n_kv_heads(family: str, heads: str, guard: str) -> Case:
    # Upstream's own check is out of the way: it would speak first, and must not be needed.
    return Case.parse(f"{family}:{heads}:guard={guard}", ranks=4)


CASES = [above_n_kv_heads(family, heads, guard) for family in FAMILIES for heads, guard in GUARDED]


@pytest.mark.parametrize(("heads", "guard"), GUARDED)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_indivisible_degree_is_refused_on_every_rank_before_anything_is_touched(
    result_of: ResultOf, family: str, heads: str, guard: str
) -> None:
    result = result_of(above_n_kv_heads(family, heads, guard))
    assert (result.truth, result.stage) == ("refused", "parallelize"), result
    assert [report["rank"] for report in result.reports] == [0, 1, 2, 3], result
    assert len({report["message"] for report in result.reports}) == 1, result
    for report in result.reports:
        assert report["message"].startswith(f"{HEADLINES[heads]} For "), result
        # 6 KV heads would allow 3 too, but the other sizes of the tiny models are powers of two.
        assert report["refusal"]["valid_degrees"] == [1, 2], result
        assert report["sharded_parameters"] == 0, result
        assert report["touched"] == [0, 0], result
