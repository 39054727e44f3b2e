"""KV-head replication: tensor parallel degrees that are multiples of ``n_kv_heads``. Off unless asked for.

Several ranks then compute the same key-value head, the one that their query heads attend to. wk and wv stay
what they are, in shape, sharding, name and checkpoint; only their forward gathers the weight over the TP
axis and keeps the rows of its own head. Its backward is a reduce-scatter, which sums the gradients of the
ranks that share a head.

    gather.py           the projection of one rank's own head
    linears.py          wk and wv of torchtitan 0.3.x, of any precision, with LoRA or without
    torchtitan_0_2.py   how it goes into a model of torchtitan 0.2.x
    torchtitan_0_3.py   how it goes into a model config of torchtitan 0.3.x: `ReplicateKVHeads`
    transformers_backend.py   how it goes into a model that transformers builds, in either line

What it can be had with is told by ``releases/kv_replication.py``, since the degrees that work depend on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchtitan_tp_validate.kv_replication import torchtitan_0_2, torchtitan_0_3
    from torchtitan_tp_validate.kv_replication.torchtitan_0_3 import ReplicateKVHeads
    from torchtitan_tp_validate.releases.base import KVReplication

    _BY_LINE: tuple[KVReplication, ...] = (torchtitan_0_2, torchtitan_0_3)

__all__ = ["ReplicateKVHeads"]


def __getattr__(name: str) -> Any:
    # Deferred: it subclasses torchtitan 0.3.x, and the package must load without any.
    if name == "ReplicateKVHeads":
        from torchtitan_tp_validate.kv_replication.torchtitan_0_3 import ReplicateKVHeads

        return ReplicateKVHeads
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
