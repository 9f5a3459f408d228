"""Puts whole texts, or conversations, into rows of limited length, several in a row where they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from typing_extensions import override

from lightning_megatron.data.collators.padding import IGNORED_LABEL
from lightning_megatron.data.huggingface.streams import DocumentStream, State

if TYPE_CHECKING:
    from datasets import Dataset


def best_fit(lengths: Sequence[int] | np.ndarray, space: int) -> list[list[int]]:
    """Share pieces out over rows: each, the longest first, goes into the row that it leaves the least space in.

    Args:
        lengths: The length of each piece, which is positive and at most ``space``.
        space: The length of a row.

    Returns:
        The numbers of the pieces in each row.
    """
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(space + 1)]  # the rows by the space that is left in them
    occurs = 0  # a bit for each space of which there is a row
    for piece in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[piece])
        if fits := occurs >> length:
            left = length + (fits & -fits).bit_length() - 1
            row = with_space[left].pop()
            occurs ^= (not with_space[left]) << left
        else:
            left, row = space, len(rows)
            rows.append([])
        rows[row].append(piece)
        left -= length
        with_space[left].append(row)
        occurs |= 1 << left
    return rows


class WholeTexts(TorchDataset[dict[str, Tensor]]):
    """Rows of whole texts, each row as full as they fit.

    Args:
        texts: A dataset with ``input_ids`` and perhaps ``labels``, as ``tokenise`` returns it.
        seq_length: Tokens of a row, and at most of a text.
    """

    def __init__(self, texts: Dataset, seq_length: int) -> None:
        self._texts = texts.with_format("arrow")
        self._columns = ("input_ids", "labels" if "labels" in texts.column_names else "input_ids")
        chunks = self._texts[:]["input_ids"].chunks if len(texts) else []
        self._lengths = np.concatenate([np.diff(chunk.offsets) for chunk in chunks] or [np.empty(0, np.int32)])
        self.rows = best_fit(self._lengths, seq_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Read one row, in the form of ``packed_row``."""
        numbers = self.rows[index]
        table = self._texts[numbers]
        ids, labels = (table[name].combine_chunks().flatten().to_numpy() for name in self._columns)
        return packed_row(ids, labels, self._lengths[numbers])


class WholeTextStream(TorchIterableDataset[dict[str, Tensor]]):
    """Rows of texts in the order of a stream; the first that does not fit begins the next row.

    Args:
        texts: The stream of samples with ``input_ids`` and perhaps ``labels``.
        seq_length: Tokens of a row, and at most of a text.
    """

    def __init__(self, texts: DocumentStream, seq_length: int) -> None:
        self._texts = texts
        self._seq_length = seq_length
        self._next: list[list[int]] = [[], []]  # the ids and labels of the text that begins the next row
        self._resumed = False

    @override
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield rows in the form of ``packed_row``."""
        if not self._resumed:
            self._next = [[], []]
        self._resumed = False
        row = [self._next] if self._next[0] else []
        for sample in self._texts:
            more = [sample["input_ids"], sample.get("labels", sample["input_ids"])]
            if row and sum(len(ids) for ids, _ in row) + len(more[0]) > self._seq_length:
                self._next = more
                yield _joined(row)
                row = [more]
            else:
                row.append(more)
        self._next = [[], []]
        if row:
            yield _joined(row)

    def state_dict(self) -> State:
        """The position of the next text, and the one that begins the next row."""
        return {"conversations": self._texts.state_dict(), "next": torch.tensor(self._next, device="cpu")}

    def load_state_dict(self, state: State) -> None:
        """Continue at the position in ``state``."""
        self._texts.load_state_dict(state["conversations"])
        self._next, self._resumed = state["next"].tolist(), True


class CollateWholeTexts:
    """Makes a batch of packed rows for ``GPTModule``, padded to the longest.

    Args:
        pad_id: Token id that follows shorter rows. It has no label, and no text looks at it.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack rows: ``input_ids``, ``labels`` and ``position_ids``, each int64 ``[b, s]``.

        Positions begin at 0 in each text, and in the padding, which is like a text of its own.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        return {
            "input_ids": _padded(rows, "input_ids", self.pad_id),
            "labels": _padded(rows, "labels", IGNORED_LABEL),
            "position_ids": torch.stack(
                [_positions([*row["lengths"], longest - len(row["input_ids"])]) for row in rows]
            ),
        }


class CollateNumberedTexts:
    """Hands packed rows to a collate function, with the number of each token's text.

    Args:
        collate_fn: Makes a batch from samples with ``input_ids`` and ``seq_idx``, each ``[s]``, as ``MaskedLMCollator``
            does for ``BertModule``.
    """

    def __init__(self, collate_fn: Callable[[list[dict[str, Tensor]]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> Any:
        """Make a batch; the texts of each row are numbered from 0."""
        return self.collate_fn(
            [
                {
                    "input_ids": row["input_ids"],
                    "seq_idx": torch.from_numpy(np.repeat(np.arange(len(row["lengths"])), row["lengths"])),
                }
                for row in rows
            ]
        )


def packed_row(ids: np.ndarray, labels: np.ndarray, lengths: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
    """Make a row of the tokens of several texts.

    Args:
        ids: The tokens, ``[s]``.
        labels: The label of each token itself, ``[s]``.
        lengths: The length of each text.

    Returns:
        ``input_ids`` and ``labels``, int64 ``[s]``, and ``lengths`` ``[texts]``. The first token of each text,
        which only another one could predict, has no label.
    """
    found = torch.from_numpy(labels.astype(np.int64))
    return {
        "input_ids": torch.from_numpy(ids.astype(np.int64)),
        "labels": found.masked_fill(_positions(lengths) == 0, IGNORED_LABEL),
        "lengths": torch.from_numpy(np.asarray(lengths, np.int64)),
    }


def _positions(lengths: Iterable[Any]) -> Tensor:
    """The place of each token in its text, ``[s]``."""
    return torch.from_numpy(np.concatenate([np.arange(int(length)) for length in lengths]))


def _joined(row: list[list[list[int]]]) -> dict[str, Tensor]:
    ids, labels = (np.concatenate([np.asarray(each[part], np.int64) for each in row]) for part in (0, 1))
    return packed_row(ids, labels, [len(each[0]) for each in row])


def _padded(rows: Sequence[Mapping[str, Tensor]], name: str, value: int) -> Tensor:
    return pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
