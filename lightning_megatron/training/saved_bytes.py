"""Counts the bytes that autograd keeps for the backward pass, by torch's hooks on saved tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Self

import torch
from typing_extensions import override


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """A context in which the tensors that autograd saves are counted, each storage once, and parameters not.

    It may span several forward and backward passes: what a backward pass has freed counts no more. A storage that is
    emptied after it was saved, as recomputation does, counts as empty from then on.

    Args:
        parameters: Tensors that are there anyway, whose storages are left out.

    Attributes:
        peak: The most bytes that were kept at once.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        super().__init__(self._pack, self._unpack)
        self._left_out = {tensor.untyped_storage()._cdata for tensor in parameters}
        self._held: Counter[int] = Counter()
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.peak = 0

    @override
    def __enter__(self) -> Self:  # type: ignore[override]
        super().__enter__()
        return self

    @property
    def now(self) -> int:
        """The bytes that are kept at the moment."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        saved = _Saved(self, tensor)
        if tensor.untyped_storage()._cdata not in self._left_out:
            self.peak = max(self.peak, self.now)
        return saved

    @staticmethod
    def _unpack(saved: _Saved) -> torch.Tensor:
        return saved.tensor

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, unless it is counted already or left out."""
        if storage._cdata not in self._left_out:
            self._held[storage._cdata] += 1
            self._storages[storage._cdata] = storage

    def release(self, storage: torch.UntypedStorage) -> None:
        """Count a storage no more, once for each time it was held."""
        key = storage._cdata
        if key in self._held:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key], self._storages[key]


class _Saved:
    """A saved tensor, which says when it is freed."""

    def __init__(self, counter: SavedBytes, tensor: torch.Tensor) -> None:
        self.counter, self.tensor, self.storage = counter, tensor, tensor.untyped_storage()
        counter.hold(self.storage)

    def __del__(self) -> None:
        self.counter.release(self.storage)
