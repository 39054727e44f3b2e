"""The tokens that a rehearsal trains on: every data rank its own rows of the same batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

END_OF_DOCUMENT = 0
"""The token that ends a document, and is nowhere else."""

_DOCUMENT = 16
"""Tokens in a document, on average: several share a row, as torchtitan's data sets pack them."""


@dataclass(frozen=True)
class Batches:
    """Batches of rows of random documents.

    Attributes:
        rows: sequences in a batch, on all data ranks together.
        seq_len: tokens in each.
        vocab_size: ids are below it.
        seed: draws them.
        more: what goes into the inputs beside tokens and positions.
        ignored: the label that the loss passes over, or None where it knows none. Some rows have more of
            them than others, as those of chats do: a mean over a rank's own labels is another one then.
        passed: how many batches are not yielded: a run that resumes has trained on them.
    """

    rows: int
    seq_len: int
    vocab_size: int
    seed: int
    more: tuple[tuple[str, Any], ...] = ()
    ignored: int | None = None
    passed: int = 0

    @property
    def labels(self) -> int:
        """How many labels of a batch count."""
        return self.rows * self.seq_len - sum(map(self._ignored_in, range(self.rows)))

    def of_rank(
        self, dp_rank: int, dp_world_size: int, batch_size: int
    ) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """Yield ``(inputs, labels)`` of one data rank, ``batch_size`` sequences at a time, without an end.

        Shapes: (batch_size, seq_len). Each rank has consecutive rows of every batch.
        """
        generator = torch.Generator().manual_seed(self.seed)
        mine = self.rows // dp_world_size
        for batch in itertools.count():
            rows = list(zip(*(self._row(row, generator) for row in range(self.rows)), strict=True))
            if batch < self.passed:
                continue
            tensors = (torch.stack(part[dp_rank * mine : (dp_rank + 1) * mine]) for part in rows)
            for tokens, positions, labels in zip(*(t.split(batch_size) for t in tensors), strict=True):
                yield {"input": tokens, "positions": positions, **dict(self.more)}, labels

    def _row(self, row: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the tokens of a row, their positions in their documents, and their labels."""
        text = torch.randint(1, self.vocab_size, (self.seq_len + 1,), generator=generator)
        text[torch.rand(len(text), generator=generator) < 1 / _DOCUMENT] = END_OF_DOCUMENT
        tokens, labels = text[:-1].clone(), text[1:].clone()
        index = torch.arange(self.seq_len)
        begins = torch.cat([torch.tensor([True]), tokens[:-1] == END_OF_DOCUMENT])
        positions = index - torch.where(begins, index, 0).cummax(0).values
        if self.ignored is not None:
            labels[torch.randperm(self.seq_len, generator=generator)[: self._ignored_in(row)]] = self.ignored
        return tokens, positions, labels

    def _ignored_in(self, row: int) -> int:
        return 0 if self.ignored is None else row % 4 * self.seq_len // 4
