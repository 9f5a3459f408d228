"""Tokenises the rows of a Hugging Face dataset, and cuts samples of a fixed length from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from typing_extensions import override

from lightning_megatron.data.collators.padding import IGNORED_LABEL
from lightning_megatron.data.huggingface.dataset_source import check_column
from lightning_megatron.data.huggingface.row_encoder import RowEncoder
from lightning_megatron.data.text_files import lone_surrogate
from lightning_megatron.data.tokenizers import Tokenizer, begun

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

# To be raised when the same rows give other tokens than before.
_FORMAT = 3

# Columns that mark the ids that have labels, by the names in transformers' chat templates, TRL and Megatron.
_LEARNT = ("completion_mask", "assistant_masks", "loss_mask")


@dataclass(frozen=True)
class Encoder(RowEncoder):
    """Makes a row's tokens.

    Args:
        tokenizer: The tokenizer that turns text into ids.
        text_column: The column with the text, with ids, or with messages of a chat.
        prompt_column: The column with the beginning of a sample, which the model reads but does not learn.
        keep_columns: Columns that are kept as they are.
        append_eod: Whether the end-of-document id is added to texts, and to ids without labels, that lack it.
        max_length: Number of tokens at which a row is cut off; None cuts nothing.
        has_labels: Whether columns such as "labels" hold the labels of ids.
    """

    tokenizer: Tokenizer
    text_column: str
    prompt_column: str | None
    keep_columns: tuple[str, ...]
    append_eod: bool
    max_length: int | None
    has_labels: bool = False

    @override
    def check(self, columns: Sequence[str]) -> None:
        check_column(self.text_column, columns, "text_column")
        if self.prompt_column is not None:
            check_column(self.prompt_column, columns, "prompt_column")
        for column in self.keep_columns:
            check_column(column, columns, "keep_columns")

    @override
    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Make ``input_ids``, ``labels`` (with labels or a prompt) and kept columns; None if nothing is learnt."""
        prompt, ids = self._prompt_and_text(row)
        if not ids:
            return None
        labels = self._labels(row, ids)
        end = [self.tokenizer.eod_id] if self._lacks_end(row, ids) else []
        ids = [*prompt, *ids, *end][: self.max_length]
        labels = [*[IGNORED_LABEL] * len(prompt), *labels, *end][: self.max_length]
        if all(label == IGNORED_LABEL for label in labels):
            return None
        sample = {"input_ids": ids, **{name: row[name] for name in self.keep_columns}}
        return {**sample, "labels": labels} if self._is_labelled else sample

    @property
    @override
    def identity(self) -> tuple[Any, ...]:
        columns = (self.text_column, self.prompt_column, self.keep_columns)
        return (_FORMAT, self.tokenizer.identity, *columns, self.append_eod, self.max_length, self.has_labels)

    @property
    @override
    def names(self) -> list[str]:
        return ["input_ids", *(["labels"] if self._is_labelled else []), *self.keep_columns]

    @property
    @override
    def kept(self) -> tuple[str, ...]:
        return self.keep_columns

    @property
    def _is_labelled(self) -> bool:
        return self.has_labels or self.prompt_column is not None

    def _labels(self, row: Mapping[str, Any], ids: list[int]) -> list[int]:
        """The labels of the ids: the row's own, or the ids themselves."""
        if not self.has_labels:
            return ids
        labels = self._of_each(row, "labels", ids) if "labels" in row else ids
        for name in _LEARNT:
            if name in row:
                learnt = self._of_each(row, name, ids)
                labels = [label if on else IGNORED_LABEL for label, on in zip(labels, learnt, strict=True)]
        return labels

    def _of_each(self, row: Mapping[str, Any], name: str, ids: list[int]) -> list[int]:
        """The values that a column has for each id, without those that the attention mask hides."""
        values = row[name]
        if not _is_list(values):
            raise ValueError(
                f"HFDataModule: a row has {name!r} {values!r} beside ids in {self.text_column!r}, and other rows have a"
                f" value for each id. Correct the rows, or remove_columns({name!r})."
            )
        values = _shown(row, values)
        if len(values) != len(ids):
            not_learnt = IGNORED_LABEL if name == "labels" else 0
            raise ValueError(
                f"HFDataModule: a row has {len(values)} {name!r} and {len(ids)} ids in {self.text_column!r}; each id"
                f" has one, {not_learnt} where it is not learnt. Correct the rows, or remove_columns({name!r})."
            )
        return values

    def _refuse_documents(self, row: Mapping[str, Any]) -> None:
        """Refuse a row that packs several documents, which would attend to each other."""
        positions = row.get("position_ids")
        if "position_ids" in self.keep_columns or not _is_list(positions):
            return
        if any(step != 1 for step in np.diff(_shown(row, positions))):
            raise ValueError(
                "HFDataModule: the 'position_ids' of a row do not increase by one, so it holds several documents,"
                " which would attend to each other. Make a row of each, use keep_columns=['position_ids'] with a"
                " collate_fn that hands them on, or remove_columns('position_ids')."
            )

    def _lacks_end(self, row: Mapping[str, Any], ids: list[int]) -> bool:
        """Whether the end-of-document id is to be added; rows with labels and chats have their own ends."""
        complete = self.has_labels or is_chat(row[self.text_column]) or ids[-1] == self.tokenizer.eod_id
        return self.append_eod and not complete

    def _prompt_and_text(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """The ids of prompt and text, begun as the tokenizer's own call begins them; given ids stay as they are."""
        value, before = row[self.text_column], None if self.prompt_column is None else row[self.prompt_column]
        if is_chat(value):
            return self._chat(value, before)
        ids = self._ids(row, self.text_column)
        if self.prompt_column is None:
            return [], begun(self.tokenizer, ids) if ids and isinstance(value, str) else ids
        if is_chat(before):
            return self._chat_ids(before, answers=True), ids
        prompt = self._ids(row, self.prompt_column)
        is_text = isinstance(before, str) or (before is None and isinstance(value, str))
        return begun(self.tokenizer, prompt) if is_text else prompt, ids

    def _chat(self, messages: Any, before: Any) -> tuple[list[int], list[int]]:
        """The ids of the prompt's messages, and of the messages that follow."""
        if before is None:
            return [], self._chat_ids(messages, answers=False)
        if not is_chat(before):
            raise ValueError(
                f"HFDataModule: column {self.text_column!r} holds messages and {self.prompt_column!r} {before!r}. Make"
                " both columns messages, or both text."
            )
        prompt, whole = self._chat_ids(before, answers=True), self._chat_ids([*before, *messages], answers=False)
        if whole[: len(prompt)] != prompt:
            raise ValueError(
                f"HFDataModule: by the tokenizer's chat_template the messages of {self.prompt_column!r} become other"
                " text alone than with an answer, so the answer's beginning is unknown. Make columns of text."
            )
        return prompt, whole[len(prompt) :]

    def _chat_ids(self, messages: Any, answers: bool) -> list[int]:
        chat = getattr(self.tokenizer, "chat", None)
        if chat is None:
            raise ValueError(
                f"HFDataModule: messages become ids by a chat_template, and {type(self.tokenizer).__name__} has none."
                " Use a tokenizer of transformers, or make a column of text."
            )
        return list(chat(list(messages), answers))

    def _ids(self, row: Mapping[str, Any], column: str) -> list[int]:
        value = row[column]
        if isinstance(value, str) and (half := lone_surrogate(value)) is not None:
            raise ValueError(
                f"HFDataModule: column {column!r} has {half}, half of a surrogate pair, which is no character, in"
                f" {value[:60]!r}. Correct the row."
            )
        if value is None or isinstance(value, str):
            return self.tokenizer.encode(value) if value else []
        if np.ndim(value) == 1 and all(isinstance(id_, (int, np.integer)) for id_ in value):
            self._refuse_documents(row)
            return _shown(row, value) if column == self.text_column else [int(id_) for id_ in value]
        raise ValueError(
            f"HFDataModule: column {column!r} holds {value!r}, which is neither text, nor a list of token ids, nor a"
            f" list of messages with 'role' and 'content'. Name another of {list(row)}."
        )


def is_chat(value: Any) -> bool:
    """Whether a column's value is a list of messages, each with a role and content."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)
    )


def labels_in(row: Mapping[str, Any], text_column: str) -> bool:
    """Whether a row has a label for each id. A class label, of which a text has one, does not count.

    Raises:
        ValueError: The row has such labels beside a text, whose ids they cannot match.
    """
    of_ids = np.ndim(row[text_column]) == 1 and not is_chat(row[text_column])
    for name in ("labels", *_LEARNT):
        if of_ids and name in row and (row[name] is None or _is_list(row[name])):
            return True
        if not of_ids and _is_list(row.get(name)):
            raise ValueError(
                f"HFDataModule(text_column={text_column!r}): the column {name!r} has a value for each id, and"
                f" {text_column!r} holds {type(row[text_column]).__name__} and no ids. Name the column of ids, such as"
                f" 'input_ids', or remove_columns({name!r})."
            )
    return False


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray))


def _shown(row: Mapping[str, Any], values: Any) -> list[int]:
    """The ids or labels of a row, without the padding that a column "attention_mask" of the same length marks."""
    mask = row.get("attention_mask")
    if mask is None or np.ndim(mask) != 1 or len(mask) != len(values):
        return [int(value) for value in values]
    return [int(value) for value, shown in zip(values, mask, strict=True) if shown]


def tokenise(rows: Dataset, encoder: RowEncoder, cache_dir: Path, num_proc: int | None) -> Dataset:
    """Tokenise a dataset into a file in the format of ``datasets``, or open the file of an earlier call.

    The file's name follows from the rows and the encoder. The file is complete or absent, even if several processes
    write it.

    Args:
        rows: The dataset, which is not empty.
        encoder: The encoder that makes the tokens; rows without tokens are left out.
        cache_dir: The folder of the file, made if it does not exist.
        num_proc: Number of processes that tokenise.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(rows, encoder)
    tokenised = rows.with_format(None).map(
        encoder.encode_columns,
        batched=True,
        remove_columns=rows.column_names,
        features=encoder.features(rows.features),
        num_proc=num_proc,
        load_from_cache_file=True,
        cache_file_name=str(cache_dir / f"{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        desc="Tokenising",
    )
    if len(tokenised) < len(rows):
        log.info("Left out %d of %d rows, which have no label.", len(rows) - len(tokenised), len(rows))
    return tokenised


class PackedDocuments(TorchDataset[dict[str, Tensor]]):
    """Fixed-length samples cut from tokenised rows that follow one another, with labels if the rows have any.

    Sample ``i`` holds the tokens from ``i * seq_length`` up to and including ``(i + 1) * seq_length``, as in
    ``PackedTextDataset``. The tokens stay in their file, which is mapped into memory.

    Args:
        documents: The dataset with ``input_ids`` that :func:`tokenise` returns.
        seq_length: Tokens that the model sees at once.
    """

    def __init__(self, documents: Dataset, seq_length: int) -> None:
        self._columns = [name for name in ("input_ids", "labels") if name in documents.column_names]
        self._documents = documents.select_columns(self._columns).with_format("arrow")
        self.seq_length = seq_length
        self.num_tokens = int(self._stops[-1])

    def __len__(self) -> int:
        return max(self.num_tokens - 1, 0) // self.seq_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Read one sample.

        Returns:
            The sample, in the form of ``packed_sample``.
        """
        first, past = index * self.seq_length, (index + 1) * self.seq_length + 1
        if not 0 <= first < past <= self.num_tokens:
            raise IndexError(f"There are {len(self)} samples, and no sample {index}.")
        at = int(np.searchsorted(self._stops, first, side="right")) - 1
        pieces: list[list[np.ndarray]] = [[] for _ in self._columns]
        while first < past:
            start, stop = int(self._stops[at]), int(self._stops[at + 1])
            for found, chunks in zip(pieces, self._chunks, strict=True):
                found.append(chunks[at][first - start : past - start])
            first, at = min(stop, past), at + 1
        return packed_sample(*(np.concatenate(found) for found in pieces))

    @cached_property
    def _chunks(self) -> list[list[np.ndarray]]:
        """The tokens and labels of Arrow's batches of some hundreds of rows each, as views."""
        table = self._documents[:]
        return [[chunk.flatten().to_numpy() for chunk in table[name].chunks] for name in self._columns]

    @cached_property
    def _stops(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self._chunks[0])])

    def __getstate__(self) -> dict[str, Any]:
        # A pickled view would be a copy of the whole file; a pickled dataset is its path.
        return {name: value for name, value in vars(self).items() if name not in ("_chunks", "_stops")}


def packed_sample(tokens: np.ndarray, labels: np.ndarray | None = None) -> dict[str, Tensor]:
    """Make a sample from ``s + 1`` successive tokens.

    Args:
        tokens: The tokens, ``[s + 1]``.
        labels: The label of each token, ``[s + 1]``, or None.

    Returns:
        ``text`` ``[s + 1]``, or with labels ``tokens`` ``[s]`` and ``labels`` ``[s]``, the label of the next token; all
        int64.
    """
    text = torch.from_numpy(tokens.astype(np.int64))
    if labels is None:
        return {"text": text}
    return {"tokens": text[:-1], "labels": torch.from_numpy(labels[1:].astype(np.int64))}


def _fingerprint(rows: Dataset, encoder: RowEncoder) -> str:
    from datasets.fingerprint import Hasher

    return Hasher.hash([rows._fingerprint, encoder.identity])  # private (datasets 5.2), but named in its docs
