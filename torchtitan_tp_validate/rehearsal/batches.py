"""The tokens that a rehearsal trains on: every data rank its own rows of the same batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Batches:
    """Batches of random tokens.

    Attributes:
        rows: sequences in a batch, on all data ranks together.
        seq_len: tokens in each.
        vocab_size: ids are below it.
        seed: draws them.
        more: what goes into the inputs beside tokens and positions.
    """

    rows: int
    seq_len: int
    vocab_size: int
    seed: int
    more: tuple[tuple[str, Any], ...] = ()

    def of_rank(
        self, dp_rank: int, dp_world_size: int, batch_size: int
    ) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """Yield ``(inputs, labels)`` of one data rank, ``batch_size`` sequences at a time, without an end.

        Shapes: (batch_size, seq_len). Each rank has consecutive rows of every batch.
        """
        generator = torch.Generator().manual_seed(self.seed)
        mine = self.rows // dp_world_size
        while True:
            text = torch.randint(self.vocab_size, (self.rows, self.seq_len + 1), generator=generator)
            for rows in text[dp_rank * mine : (dp_rank + 1) * mine].split(batch_size):
                positions = torch.arange(self.seq_len).repeat(len(rows), 1)
                inputs = {"input": rows[:, :-1].contiguous(), "positions": positions, **dict(self.more)}
                yield inputs, rows[:, 1:].contiguous()
