"""Rows of a Hugging Face dataset made into tokens, and samples of a fixed length cut from them."""

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

from lightning_megatron.data.hf_source import check_column, library
from lightning_megatron.data.padding import IGNORED_LABEL
from lightning_megatron.data.text_sources import lone_surrogate
from lightning_megatron.data.text_tokenizer import Tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

# Raise it when the same rows would become other tokens than before.
_FORMAT = 1


@dataclass(frozen=True)
class Encoder:
    """Makes a row's tokens.

    Args:
        tokenizer: Turns text into ids.
        text_column: Holds the text, or ids already.
        prompt_column: Holds text before it which is read, but not learnt.
        keep_columns: Handed on as they are.
        append_eod: Whether the end-of-document id follows.
        max_length: Tokens behind it are cut off; None cuts nothing.
    """

    tokenizer: Tokenizer
    text_column: str
    prompt_column: str | None
    keep_columns: tuple[str, ...]
    append_eod: bool
    max_length: int | None

    def check(self, columns: Sequence[str]) -> None:
        """Refuse columns that are not there."""
        check_column(self.text_column, columns, "text_column")
        if self.prompt_column is not None:
            check_column(self.prompt_column, columns, "prompt_column")
        for column in self.keep_columns:
            check_column(column, columns, "keep_columns")

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """``input_ids``, ``labels`` where there are prompts, and what is kept; None where nothing is to be learnt."""
        ids = self._ids(row, self.text_column)
        if not ids:
            return None
        prompt = [] if self.prompt_column is None else self._ids(row, self.prompt_column)
        ids = [*prompt, *ids, *([self.tokenizer.eod_id] if self.append_eod else [])][: self.max_length]
        if len(ids) <= len(prompt):
            return None
        sample = {"input_ids": ids, **{name: row[name] for name in self.keep_columns}}
        if self.prompt_column is not None:
            sample["labels"] = [IGNORED_LABEL] * len(prompt) + ids[len(prompt) :]
        return sample

    def encode_columns(self, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """The same for many rows, as ``Dataset.map`` hands them over."""
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        samples = [sample for row in rows if (sample := self(row)) is not None]
        return {name: [sample[name] for sample in samples] for name in self._names}

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two encoders exactly when they encode alike."""
        columns = (self.text_column, self.prompt_column, self.keep_columns)
        return (_FORMAT, self.tokenizer.identity, *columns, self.append_eod, self.max_length)

    def features(self, given: Mapping[str, Any]) -> Any:
        """The types of the columns, for those of the dataset."""
        datasets = library()
        tokens = datasets.List(datasets.Value("int32"))
        return datasets.Features({name: given[name] if name in self.keep_columns else tokens for name in self._names})

    @property
    def _names(self) -> list[str]:
        return ["input_ids", *(["labels"] if self.prompt_column is not None else []), *self.keep_columns]

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
            return [int(id_) for id_ in value]
        raise ValueError(
            f"HFDataModule: column {column!r} holds {value!r}, which is neither text nor a list of token ids. Name"
            f" another of {list(row)}."
        )


def tokenise(rows: Dataset, encoder: Encoder, cache_dir: Path, num_proc: int | None) -> Dataset:
    """Tokenises a dataset into a file of datasets' own, or opens the file that holds it.

    The file's name follows from the rows and the encoder. It is complete or absent, whoever writes it.

    Args:
        rows: Not empty.
        encoder: Makes the tokens; rows without any are left out.
        cache_dir: The folder, made if it does not exist.
        num_proc: Processes that tokenise.
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
        log.info("Left out %d of %d rows, in which nothing is to be learnt.", len(rows) - len(tokenised), len(rows))
    return tokenised


class PackedDocuments(TorchDataset[dict[str, Tensor]]):
    """Fixed-length samples of tokenised rows that stand one after another, without padding.

    Sample ``i`` holds the tokens from ``i * seq_length`` up to and including ``(i + 1) * seq_length``, as those of
    ``PackedTextDataset``. The tokens stay in their file, which is mapped into memory.

    Args:
        documents: Has ``input_ids``, as :func:`tokenise` gives them.
        seq_length: Tokens that the model sees at once.
    """

    def __init__(self, documents: Dataset, seq_length: int) -> None:
        self._documents = documents.select_columns("input_ids").with_format("arrow")
        self.seq_length = seq_length
        self.num_tokens = int(self._stops[-1])

    def __len__(self) -> int:
        return max(self.num_tokens - 1, 0) // self.seq_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Reads one sample.

        Returns:
            ``{"text": ...}``, int64, ``[seq_length + 1]``.
        """
        first, past = index * self.seq_length, (index + 1) * self.seq_length + 1
        if not 0 <= first < past <= self.num_tokens:
            raise IndexError(f"There are {len(self)} samples, and no sample {index}.")
        at = int(np.searchsorted(self._stops, first, side="right")) - 1
        pieces = []
        while first < past:
            start, stop = int(self._stops[at]), int(self._stops[at + 1])
            pieces.append(self._chunks[at][first - start : past - start])
            first, at = min(stop, past), at + 1
        return {"text": torch.from_numpy(np.concatenate(pieces).astype(np.int64))}  # [s + 1]

    @cached_property
    def _chunks(self) -> list[np.ndarray]:
        """Arrow's batches of rows, each the tokens of some hundreds of documents: views, no copies."""
        return [chunk.flatten().to_numpy() for chunk in self._documents[:]["input_ids"].chunks]

    @cached_property
    def _stops(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self._chunks)])

    def __getstate__(self) -> dict[str, Any]:
        # The views pickle as copies of the whole file; the dataset pickles as its path.
        return {name: value for name, value in vars(self).items() if name not in ("_chunks", "_stops")}


def _fingerprint(rows: Dataset, encoder: Encoder) -> str:
    from datasets.fingerprint import Hasher

    return Hasher.hash([rows._fingerprint, encoder.identity])  # private (datasets 5.2), but named in its docs
