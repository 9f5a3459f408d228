"""Writes Megatron's indexed data, whole or not at all, and checks it before it is read.

A prefix names two files: ``PREFIX.bin`` has the token ids of all items, and ``PREFIX.idx`` has the items' lengths and
the documents that they make up. An item is a document, or for BERT and T5 a sentence.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from lightning_megatron.data.atomic_write import atomic_path

# The header of an index: magic, version, code of the dtype, number of items, number of documents + 1.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_BYTES_OF_AN_ITEM = 4 + 8  # its length and its offset
_BYTES_OF_A_DOCUMENT = 8


class IndexedDataError(ValueError):
    """Raised when indexed data are missing, cut short, or differ from what their index says."""


class IndexedWriter:
    """Adds documents to the files that :func:`writing` writes.

    Args:
        builder: megatron-core's builder of the files.
        vocab_size: Number of ids; ids outside of it are refused.
    """

    def __init__(self, builder: IndexedDatasetBuilder, vocab_size: int) -> None:
        self._builder = builder
        self._vocab_size = vocab_size
        self.documents = 0
        self.tokens = 0

    def add(self, items: list[list[int]], name: str | None = None) -> None:
        """Add one document.

        Args:
            items: Token ids of the document's items: one item, or one for each sentence.
            name: The document's name in errors; by default its number.

        Raises:
            ValueError: The document is empty, or an id is outside of the vocabulary and would be written as another id.
        """
        name = f"Document {self.documents}" if name is None else name
        if not all(items) or not items:
            raise ValueError(f"{name} is empty, or has an empty item. Leave it out.")
        for item in items:
            if min(item) < 0 or max(item) >= self._vocab_size:
                raise ValueError(
                    f"{name} has ids from {min(item)} to {max(item)}, outside the vocab_size of"
                    f" {self._vocab_size}. Correct the tokenizer's `vocab_size`."
                )
            self._builder.add_item(torch.tensor(item, device="cpu"))
            self.tokens += len(item)
        self._builder.end_document()
        self.documents += 1


@contextmanager
def writing(prefix: str | Path, vocab_size: int) -> Iterator[IndexedWriter]:
    """Write indexed data with megatron-core's builder; the files appear when the block ends without an error.

    Args:
        prefix: Path of the ``.bin`` and ``.idx`` files without the ending. The folder is made if it does not exist.
        vocab_size: Number of token ids; they are stored as uint16 up to 65,499 ids, as in Megatron, else as int32.

    Yields:
        The writer, which takes documents.

    Raises:
        ValueError: ``prefix`` has an ending already, or no document was added.
    """
    if Path(prefix).suffix in (".bin", ".idx"):
        raise ValueError(f"'{prefix}' must be the prefix of two files, a .bin and an .idx: leave the ending out.")
    bin_path, idx_path = files(prefix)
    bin_path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(idx_path) as idx_file, atomic_path(bin_path) as bin_file:  # the index comes last
        builder = IndexedDatasetBuilder(str(bin_file), dtype=DType.optimal_dtype(vocab_size))
        try:
            writer = IndexedWriter(builder, vocab_size)
            yield writer
            if not writer.documents:
                raise ValueError(f"There is no document to write to {bin_path}: all are empty, or there are none.")
            builder.finalize(str(idx_file))
        finally:
            builder.data_file.close()


def files(prefix: str | Path) -> tuple[Path, Path]:
    """The paths of a prefix's data and index."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def open_indexed(prefix: str | Path) -> IndexedDataset:
    """Open indexed data, after checking the sizes of its files.

    Raises:
        IndexedDataError: A file is missing or is no index, or its size is not what the index says.
    """
    bin_path, idx_path = files(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            hint = " Leave the ending out of the path." if Path(prefix).suffix in (".bin", ".idx") else ""
            raise IndexedDataError(
                f"There is no {path} (seen from {Path.cwd()}). Indexed data are a .bin and an .idx file; give"
                f" their common path without the ending.{hint} `lightning-megatron preprocess` makes them."
            ) from FileNotFoundError(path)
    itemsize = _check_index(idx_path)
    data = IndexedDataset(str(prefix))
    expected = int(data.sequence_lengths.sum(dtype=np.int64)) * itemsize
    if (found := bin_path.stat().st_size) != expected:
        raise IndexedDataError(
            f"{bin_path} has {found} bytes, and by {idx_path.name} it should have {expected}: one of them is cut short,"
            " or they belong to different data. Make them again."
        )
    return data


def check_contents(prefix: str | Path, data: IndexedDataset) -> None:
    """Refuse an index whose numbers contradict each other, and empty documents.

    Raises:
        IndexedDataError: There is one; the message names the first.
    """
    _, idx_path = files(prefix)
    lengths, documents, places = data.sequence_lengths, data.document_indices, data.index.sequence_pointers
    if len(lengths) and int(lengths.min()) <= 0:
        item = int(np.flatnonzero(lengths <= 0)[0])
        document = int(np.searchsorted(documents, item, side="right")) - 1
        raise IndexedDataError(
            f"{idx_path}: item {item} has {int(lengths[item])} tokens: document {document} is empty, or one of its"
            " sentences is. Make the data again without it."
        )
    sizes = np.diff(documents)
    if documents[0] != 0 or documents[-1] != len(lengths) or (sizes < 0).any():
        raise IndexedDataError(f"{idx_path}: its documents do not cover its {len(lengths)} items. Make the data again.")
    if (sizes == 0).any():
        raise IndexedDataError(
            f"{idx_path}: document {int(np.flatnonzero(sizes == 0)[0])} is empty. Make the data again without it."
        )
    ends = np.cumsum(lengths, dtype=np.int64) * DType.size(data.index.dtype)
    if not np.array_equal(places, ends - lengths * np.int64(DType.size(data.index.dtype))):
        raise IndexedDataError(f"{idx_path}: its items do not stand one behind another. Make the data again.")


def _check_index(idx_path: Path) -> int:
    """Check that an index is complete, and return the number of bytes of a token."""
    size = idx_path.stat().st_size
    with idx_path.open("rb") as file:
        front = file.read(_HEADER.size)
    if len(front) < _HEADER.size or front[: len(_MAGIC)] != _MAGIC:
        raise IndexedDataError(f"{idx_path} is no index of Megatron's: it begins with {front[:9]!r}. Make it again.")
    _, version, code, items, documents = _HEADER.unpack(front)
    if version != 1 or code not in {dtype.value for dtype in DType}:
        raise IndexedDataError(f"{idx_path} has version {version} and dtype {code}; 1 and 1 to 8 are known.")
    expected = _HEADER.size + items * _BYTES_OF_AN_ITEM + documents * _BYTES_OF_A_DOCUMENT
    if size != expected:
        raise IndexedDataError(
            f"{idx_path} has {size} bytes, and {items} items in {documents - 1} documents take {expected}: it is"
            f" {'cut short' if size < expected else 'too long, or multimodal'}. Make it again."
        )
    if not items or documents < 2:
        raise IndexedDataError(f"{idx_path} has no documents. Make it again from texts that are not empty.")
    return DType.size(code)
