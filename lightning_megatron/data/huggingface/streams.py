"""Makes samples from streams of rows, with a loader that can save and restore its position in the stream."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset

from lightning_megatron.data.huggingface.documents import packed_sample
from lightning_megatron.data.huggingface.row_encoder import RowEncoder

if TYPE_CHECKING:
    from datasets import IterableDataset

State: TypeAlias = dict[str, Any]


class DocumentStream(TorchIterableDataset[dict[str, Any]]):
    """The tokenised rows of a stream, shuffled within blocks of them.

    The shuffle buffer of ``datasets`` is lost when a run is resumed. Here a resumed run reads the block again: its
    order follows from ``seed``, the epoch and the block's number, so a checkpoint needs only the block's start.

    Args:
        rows: This replica's share of the rows.
        encoder: The encoder that makes the tokens.
        block: Number of rows that are shuffled with each other; 1 keeps the order.
        seed: Seed of the order of shards and of rows within blocks; None keeps the order of both.
    """

    def __init__(self, rows: IterableDataset, encoder: RowEncoder, block: int, seed: int | None) -> None:
        self._rows = rows
        self._encoder = encoder
        self._block = block if seed is not None else 1
        self._seed = seed
        self._place: State = {"epoch": -1, "block": 0, "given": 0, "rows": {}}
        self._resumed = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rest of the epoch whose state was loaded, or the next epoch."""
        if not self._resumed:
            self._place = {"epoch": self._place["epoch"] + 1, "block": 0, "given": 0, "rows": {}}
        self._resumed = False
        place = self._place
        self._rows.set_epoch(0 if self._seed is None else self._seed + place["epoch"])  # shuffles shards, not rows
        self._rows.load_state_dict(copy.deepcopy(place["rows"]))
        samples = filter(None, map(self._encoder, self._rows))
        while block := list(islice(samples, self._block)):
            for number in self._order(len(block))[place["given"] :]:
                place["given"] += 1
                yield block[number]
            place.update(block=place["block"] + 1, given=0, rows=self._rows.state_dict())

    def state_dict(self) -> State:
        """The position of the next sample."""
        return dict(self._place)

    def load_state_dict(self, state: State) -> None:
        """Continue at the position in ``state``."""
        self._place, self._resumed = dict(state), True

    def _order(self, count: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(count)
        return np.random.default_rng([self._seed, self._place["epoch"], self._place["block"]]).permutation(count)


class PackedStream(TorchIterableDataset[dict[str, Tensor]]):
    """Fixed-length samples cut from documents that follow one another, as in ``PackedTextDataset``.

    Args:
        documents: The stream of tokenised documents.
        seq_length: Tokens that the model sees at once. Tokens at the end of an epoch that fill no sample are dropped.
    """

    def __init__(self, documents: DocumentStream, seq_length: int) -> None:
        self._documents = documents
        self._seq_length = seq_length
        self._left = np.empty((1, 0), np.int64)  # the tokens, and their labels if there are any
        self._resumed = False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield samples in the form of ``packed_sample``."""
        if not self._resumed:
            self._left = self._left[:, :0]
        self._resumed = False
        documents = iter(self._documents)
        while True:
            while self._left.shape[1] > self._seq_length:
                sample, self._left = self._left[:, : self._seq_length + 1], self._left[:, self._seq_length :]
                yield packed_sample(*sample)
            if (document := next(documents, None)) is None:
                return
            more = np.array([document[name] for name in ("input_ids", "labels") if name in document], np.int64)
            self._left = np.concatenate([self._left if self._left.size else more[:, :0], more], axis=1)

    def state_dict(self) -> State:
        """The position of the next document, and the tokens that are left from earlier ones."""
        return {"documents": self._documents.state_dict(), "left": torch.from_numpy(self._left.copy())}

    def load_state_dict(self, state: State) -> None:
        """Continue at the position in ``state``."""
        self._documents.load_state_dict(state["documents"])
        left = state["left"].numpy()
        self._left, self._resumed = left if left.ndim == 2 else left[None], True  # older checkpoints have tokens only


class StreamLoader(DataLoader[Any]):
    """Makes the batches of a stream in this process; its ``state_dict`` lets a resumed run continue at the next sample.

    An epoch ends on all replicas when one of them has no batch left. Each iteration is the next epoch.

    Args:
        dataset: This replica's stream.
        replicas: Number of data-parallel replicas.
        device: The device of the tensors by which replicas agree on the end of an epoch.
        **options: Further arguments of ``DataLoader``.
    """

    def __init__(
        self, dataset: DocumentStream | PackedStream, replicas: int, device: torch.device, **options: Any
    ) -> None:
        # An iterator draws a number; with a generator of its own it leaves the run's random numbers alone.
        super().__init__(dataset, **{"generator": torch.Generator(), **options})
        self.replicas = replicas
        self.device = device
        self._resumed = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        resumed, self._resumed = self._resumed, False
        given = 0
        for batch in self._epoch():
            given += 1
            yield batch
        if resumed and not given:  # the state was saved at the end of an epoch
            yield from self._epoch()

    def state_dict(self) -> State:
        """The position of the next batch."""
        return self.dataset.state_dict()  # type: ignore[attr-defined]

    def load_state_dict(self, state: State) -> None:
        """Continue at the position in ``state``."""
        self.dataset.load_state_dict(state)  # type: ignore[attr-defined]
        self._resumed = True

    def _epoch(self) -> Iterator[Any]:
        with torch.device("cpu"):  # an iterator draws from the generator
            batches = super().__iter__()
        while self._all_have(batch := next(batches, None)):
            yield batch

    def _all_have(self, batch: Any) -> bool:
        here = torch.tensor(int(batch is not None), device=self.device)
        if self.replicas > 1:
            dist.all_reduce(here, op=dist.ReduceOp.MIN)
        return bool(here)
