"""Random generators for collators: new for each batch, and equal on the ranks that read the same samples."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info


class Draws:
    """Makes a random generator for each batch.

    A generator is seeded with ``seed`` and the samples of the batch, so that model-parallel ranks, which read the same
    samples, draw alike. A third part of its seed makes it differ from epoch to epoch. In the training process this is
    the number of batches so far; in a loader's workers it is the loader's own seed, which ``seed_everything``
    determines and a resume restores, so that a resumed run draws what it would have drawn.

    Args:
        seed: Seed of all random draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._batches = 0

    def generator(self, rows: Sequence[np.ndarray]) -> np.random.Generator:
        """Make the next batch's generator.

        Args:
            rows: The token ids of each sample of the batch.
        """
        worker = get_worker_info()
        self._batches += 1
        # The worker's number does not count: after a resume, other workers make the same batches.
        turn = [0, self._batches] if worker is None else [1, worker.seed - worker.id]
        checksum = 0
        for row in rows:
            checksum = zlib.crc32(row.tobytes(), checksum)
        return np.random.default_rng([self.seed, *turn, checksum])


def padded(rows: Sequence[np.ndarray], length: int, value: int) -> np.ndarray:
    """Stack the rows to ``[b, length]``, with ``value`` behind their ends."""
    return np.stack([np.pad(row, (0, length - len(row)), constant_values=value) for row in rows])


def ids_of(collator: str, samples: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """The ``input_ids`` of the samples as int64.

    Raises:
        ValueError: A sample is empty.
    """
    rows = [np.asarray(sample["input_ids"], dtype=np.int64) for sample in samples]
    for number, row in enumerate(rows):
        if not len(row):
            raise ValueError(
                f"{collator}: sample {number} of this batch of {len(rows)} is an empty document. Leave empty documents"
                " out of the data set."
            )
    return rows
