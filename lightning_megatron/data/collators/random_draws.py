"""Random generators of collators: equal on the ranks that read the same samples, another one for each batch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info


class Draws:
    """Makes a generator for each batch.

    It follows from ``seed`` and the samples, so that model-parallel ranks, which read the same samples, draw alike. In
    the training process how many batches this object was asked for comes to it. In a loader's workers it is the
    loader's own seed, which is another one in each epoch, follows from ``seed_everything``, and is put back by a
    resume: a resumed run draws what it would have drawn.

    Args:
        seed: Seed of all random draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._batches = 0

    def generator(self, rows: Sequence[np.ndarray]) -> np.random.Generator:
        """The next batch's generator.

        Args:
            rows: Token ids of the batch's samples.
        """
        worker = get_worker_info()
        self._batches += 1
        # Nothing of the worker itself: after a resume others make the same batches.
        turn = [0, self._batches] if worker is None else [1, worker.seed - worker.id]
        checksum = 0
        for row in rows:
            checksum = zlib.crc32(row.tobytes(), checksum)
        return np.random.default_rng([self.seed, *turn, checksum])


def padded(rows: Sequence[np.ndarray], length: int, value: int) -> np.ndarray:
    """``[b, length]``: the rows, with ``value`` behind their ends."""
    return np.stack([np.pad(row, (0, length - len(row)), constant_values=value) for row in rows])


def ids_of(collator: str, samples: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """The ``input_ids`` of the samples, int64.

    Raises:
        ValueError: One of them is empty.
    """
    rows = [np.asarray(sample["input_ids"], dtype=np.int64) for sample in samples]
    for number, row in enumerate(rows):
        if not len(row):
            raise ValueError(
                f"{collator}: sample {number} of this batch of {len(rows)} is an empty document. Leave empty documents"
                " out of the data set."
            )
    return rows
