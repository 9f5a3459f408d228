"""Pads samples of unequal length into one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

IGNORED_LABEL = -100


class PaddingCollator:
    """Makes batches for ``GPTModule`` from tokenized samples, padded on the right to the longest sample of the batch.

    transformers' ``DataCollatorForSeq2Seq`` is not used: it needs a transformers tokenizer, where here only a token id
    is known, and it gives no labels to samples without any.

    Args:
        pad_id: Token id that follows short samples. It is masked and has no label, so any id of the vocabulary will do.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad samples and stack them.

        Args:
            samples: Mappings with ``input_ids`` ``[s]``; optional ``labels`` ``[s]``, by default the input ids where
                the sample is not padded; and an optional ``attention_mask`` ``[s]``, 0 where the sample is padded.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, each ``[b, s]``; labels are −100 on the padding.
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
