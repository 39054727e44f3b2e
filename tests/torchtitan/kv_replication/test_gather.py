from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torchtitan_tp_validate.kv_replication.gather import rows_of_own_head  # noqa: E402


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "tp"), [(8, 2, 4), (8, 1, 4), (8, 2, 8), (12, 3, 6), (16, 4, 8)]
)
def test_a_rank_keeps_the_head_that_its_query_heads_attend_to(n_heads: int, n_kv_heads: int, tp: int) -> None:
    head_dim = 3
    head_of_row = torch.arange(n_kv_heads).repeat_interleave(head_dim)
    for rank in range(tp):
        own = rows_of_own_head(head_of_row, n_kv_heads=n_kv_heads, tp=tp, tp_rank=rank)
        queries = range(rank * n_heads // tp, (rank + 1) * n_heads // tp)
        wanted = {query * n_kv_heads // n_heads for query in queries}
        assert set(own.tolist()) == wanted
        assert own.shape == (head_dim,)


def test_the_rows_of_the_other_heads_are_let_go() -> None:
    rows = torch.zeros(8, 3)
    own = rows_of_own_head(rows, n_kv_heads=2, tp=4, tp_rank=3)
    assert own.untyped_storage().nbytes() == rows.untyped_storage().nbytes() // 2
