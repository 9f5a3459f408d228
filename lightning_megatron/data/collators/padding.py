"""Samples of unequal length made into one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

IGNORED_LABEL = -100


class PaddingCollator:
    """Makes batches for ``GPTModule`` of tokenised samples, padded to the longest of the batch.

    Args:
        pad_id: Id behind the end of short samples; it is masked, so any will do.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad.

        Args:
            samples: Mappings with ``input_ids`` ``[s]``, and optional ``labels`` ``[s]``, which are the inputs
                otherwise, and ``attention_mask`` ``[s]``, 0 where there is padding already.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` ``[b, s]``; labels are −100 on the padding.
        """
        rows = [_ids(sample["input_ids"]) for sample in samples]
        keep = [
            torch.ones_like(row) if sample.get("attention_mask") is None else _ids(sample["attention_mask"])
            for row, sample in zip(rows, samples, strict=True)
        ]
        labels = [
            row.masked_fill(shown == 0, IGNORED_LABEL) if sample.get("labels") is None else _ids(sample["labels"])
            for row, shown, sample in zip(rows, keep, samples, strict=True)
        ]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence(keep, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
        }


def _ids(row: Any) -> torch.Tensor:
    return torch.as_tensor(row, dtype=torch.int64, device="cpu")
