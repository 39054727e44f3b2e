"""The memory that a step takes at its peak, counted at the operations that make its tensors.

torch's own ``torch.distributed._tools.mem_tracker`` refuses a model that is called more than once in a step,
as with microbatches or a loss in chunks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes of the tensors that are made while it is entered, as long as they are there.

    Attributes:
        peak: the most that were there at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._sizes: dict[int, int] = {}
        self._resize = mock.patch.object(torch.UntypedStorage, "resize_", self._resized)

    def __enter__(self) -> PeakMemory:
        self._resize.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resize.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it makes; a view, and what is changed in place, was there."""
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # The operations that it is made of come by.
        given = {id(storage) for storage in _storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if id(storage) not in given:
                self._put(storage, storage.nbytes())
        return made

    def _put(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)
        if key not in self._sizes:
            weakref.finalize(storage, self._drop, key)
        self._now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self._now)

    def _drop(self, key: int) -> None:
        self._now -= self._sizes.pop(key)

    @property
    def _resized(self) -> Any:
        """What stands in for ``resize_``, by which FSDP frees gathered weights and takes them back."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._put(storage, size)
            return result

        return resize_


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()
