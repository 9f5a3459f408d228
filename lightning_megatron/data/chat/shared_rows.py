"""Puts whole conversations into rows of limited length, several in a row where they fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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


class PackedConversations(TorchDataset[dict[str, Tensor]]):
    """Rows of whole conversations, each row as full as they fit.

    Args:
        conversations: A dataset with ``input_ids`` and ``labels``, as ``tokenise`` returns it.
        seq_length: Tokens of a row, and at most of a conversation.
    """

    def __init__(self, conversations: Dataset, seq_length: int) -> None:
        self._conversations = conversations.with_format("arrow")
        chunks = self._conversations[:]["input_ids"].chunks if len(conversations) else []
        self._lengths = np.concatenate([np.diff(chunk.offsets) for chunk in chunks] or [np.empty(0, np.int32)])
        self.rows = best_fit(self._lengths, seq_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Read one row, in the form of ``packed_row``."""
        numbers = self.rows[index]
        table = self._conversations[numbers]
        ids, labels = (table[name].combine_chunks().flatten().to_numpy() for name in ("input_ids", "labels"))
        return packed_row(ids, labels, self._lengths[numbers])


class PackedConversationStream(TorchIterableDataset[dict[str, Tensor]]):
    """Rows of conversations in the order of a stream; the first that does not fit begins the next row.

    Args:
        conversations: The stream of samples with ``input_ids`` and ``labels``.
        seq_length: Tokens of a row, and at most of a conversation.
    """

    def __init__(self, conversations: DocumentStream, seq_length: int) -> None:
        self._conversations = conversations
        self._seq_length = seq_length
        self._next: list[list[int]] = [[], []]  # the ids and labels of the conversation that begins the next row
        self._resumed = False

    @override
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield rows in the form of ``packed_row``."""
        if not self._resumed:
            self._next = [[], []]
        self._resumed = False
        row = [self._next] if self._next[0] else []
        for sample in self._conversations:
            more = [sample["input_ids"], sample["labels"]]
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
        """The position of the next conversation, and the one that begins the next row."""
        return {"conversations": self._conversations.state_dict(), "next": torch.tensor(self._next, device="cpu")}

    def load_state_dict(self, state: State) -> None:
        """Continue at the position in ``state``."""
        self._conversations.load_state_dict(state["conversations"])
        self._next, self._resumed = state["next"].tolist(), True


class CollateConversations:
    """Makes a batch of packed rows, padded to the longest.

    Args:
        pad_id: Token id that follows shorter rows. It has no label, and no conversation looks at it.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack rows: ``input_ids``, ``labels`` and ``position_ids``, each int64 ``[b, s]``.

        Positions begin at 0 in each conversation, and in the padding, which is like a conversation of its own.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        return {
            "input_ids": _padded(rows, "input_ids", self.pad_id),
            "labels": _padded(rows, "labels", IGNORED_LABEL),
            "position_ids": torch.stack(
                [_positions([*row["lengths"], longest - len(row["input_ids"])]) for row in rows]
            ),
        }


def packed_row(ids: np.ndarray, labels: np.ndarray, lengths: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
    """Make a row of the tokens of several conversations.

    Args:
        ids: The tokens, ``[s]``.
        labels: The label of each token itself, ``[s]``.
        lengths: The length of each conversation.

    Returns:
        ``input_ids`` and ``labels``, int64 ``[s]``, and ``lengths`` ``[conversations]``. The first token of each
        conversation, which only another one could predict, has no label.
    """
    found = torch.from_numpy(labels.astype(np.int64))
    return {
        "input_ids": torch.from_numpy(ids.astype(np.int64)),
        "labels": found.masked_fill(_positions(lengths) == 0, IGNORED_LABEL),
        "lengths": torch.from_numpy(np.asarray(lengths, np.int64)),
    }


def _positions(lengths: Iterable[Any]) -> Tensor:
    """The place of each token in its conversation, ``[s]``."""
    return torch.from_numpy(np.concatenate([np.arange(int(length)) for length in lengths]))


def _joined(row: list[list[list[int]]]) -> dict[str, Tensor]:
    ids, labels = (np.concatenate([np.asarray(each[part], np.int64) for each in row]) for part in (0, 1))
    return packed_row(ids, labels, [len(each[0]) for each in row])


def _padded(rows: Sequence[Mapping[str, Tensor]], name: str, value: int) -> Tensor:
    return pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
