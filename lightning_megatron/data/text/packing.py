"""Packs text into one memory-mapped file of tokens, and reads samples from it."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_megatron.data.atomic_write import atomic_path
from lightning_megatron.data.text_files import read_text
from lightning_megatron.data.tokenizers import Tokenizer, begun
from lightning_megatron.distributed.argument_names import answer_wrong_names

log = logging.getLogger(__name__)

# To be raised when the same files give other tokens than before.
_FORMAT = 1


def pack(files: Sequence[Path], tokenizer: Tokenizer, cache_dir: Path) -> Path:
    """Tokenise documents into one file, unless an earlier call has done so.

    The documents follow one another. Each begins as the tokenizer begins texts, and ends with the end-of-document id;
    empty ones are left out. The name of the packed file is made from the files' names, sizes and times and from the
    tokenizer, so a finished file never changes while somebody reads it.

    Args:
        files: The files, each of which is one document.
        tokenizer: The tokenizer that turns text into ids.
        cache_dir: The folder of the packed file, made if it does not exist.

    Returns:
        The ``.bin`` file: ids as uint16, or as uint32 where the vocabulary has more than 65,536. A ``.json`` beside it
        describes it.

    Raises:
        ValueError: The files hold no text, or the tokenizer gives ids outside its vocabulary.
    """
    if (packed := find_packed(files, tokenizer, cache_dir)) is not None:
        return packed
    cache_dir.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(files, tokenizer)
    bin_path = _bin_path(fingerprint, cache_dir)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    with atomic_path(bin_path) as temporary, temporary.open("xb") as stream:
        num_tokens = _write_tokens(stream, files, tokenizer, dtype)
        if num_tokens == 0:
            raise ValueError(f"All {len(files)} text files are empty, the first is {files[0]}. Name others.")
    # The description is written last, so that the tokens are complete if it exists.
    with atomic_path(bin_path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({"dtype": dtype.name, "num_tokens": num_tokens, **fingerprint}, indent=1))
    log.info("Packed %d files into %d tokens: %s", len(files), num_tokens, bin_path)
    return bin_path


def find_packed(files: Sequence[Path], tokenizer: Tokenizer, cache_dir: Path) -> Path | None:
    """Find the file that :func:`pack` wrote for the same files and tokenizer.

    Returns:
        The ``.bin`` file; None where it is missing or incomplete, or the files have changed since.
    """
    bin_path = _bin_path(_fingerprint(files, tokenizer), cache_dir)
    try:
        dtype, num_tokens = _describe(bin_path)
        complete = bin_path.stat().st_size == num_tokens * dtype.itemsize
    except (FileNotFoundError, ValueError, KeyError):  # the description is absent, is no JSON, or lacks a field
        return None
    return bin_path if complete else None


@answer_wrong_names
class PackedTextDataset(Dataset[dict[str, Tensor]]):
    """Fixed-length samples cut from a packed file, without padding.

    Sample ``i`` holds the tokens from ``i * seq_length`` up to and including ``(i + 1) * seq_length``. As in Megatron,
    neighbouring samples share one token, which is the last label of one and the first input of the next.

    Args:
        bin_path: A file written by :func:`pack`.
        seq_length: Tokens that the model sees at once.
        samples: The range of the file's samples that the dataset has. By default it has all of them.

    Raises:
        ValueError: ``seq_length`` is not positive, the file is shorter than one sample, or ``samples`` goes beyond it.
    """

    def __init__(self, bin_path: str | Path, seq_length: int, samples: range | None = None) -> None:
        self.bin_path = Path(bin_path)
        self.seq_length = seq_length
        self._dtype, self.num_tokens = _describe(self.bin_path)
        if seq_length < 1:
            raise ValueError(f"PackedTextDataset(seq_length={seq_length}) must be at least 1.")
        available = range((self.num_tokens - 1) // seq_length)
        if not available:
            raise ValueError(
                f"The text has {self.num_tokens} tokens, and one sample takes seq_length + 1 = {seq_length + 1}. "
                f"Use seq_length={self.num_tokens - 1} or less, or more text."
            )
        self.samples = available if samples is None else samples
        if any(end not in available for end in (*self.samples[:1], *self.samples[-1:])):
            raise ValueError(f"{self.samples} goes beyond the {len(available)} samples of {seq_length} in {bin_path}.")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Read one sample.

        Returns:
            ``{"text": ...}``, int64, ``[seq_length + 1]``.
        """
        start = self.samples[index] * self.seq_length
        tokens = self._tokens[start : start + self.seq_length + 1]
        return {"text": torch.from_numpy(tokens.astype(np.int64))}  # [s + 1]

    @cached_property
    def _tokens(self) -> np.ndarray:
        # The file is mapped on first use, so that each worker of a data loader maps it itself.
        return np.memmap(self.bin_path, dtype=self._dtype, mode="r", shape=(self.num_tokens,))

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would be a copy of the whole file.
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}


def _write_tokens(stream: BinaryIO, files: Iterable[Path], tokenizer: Tokenizer, dtype: np.dtype) -> int:
    num_tokens = 0
    for file in files:
        if not (text := read_text(file)):
            continue
        ids = np.asarray([*begun(tokenizer, tokenizer.encode(text)), tokenizer.eod_id], dtype=np.int64)
        if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
            raise ValueError(
                f"The tokenizer gave ids from {ids.min()} to {ids.max()} for {file}, outside its vocab_size of "
                f"{tokenizer.vocab_size}. Correct its `vocab_size`."
            )
        stream.write(ids.astype(dtype).tobytes())
        num_tokens += len(ids)
    return num_tokens


def _fingerprint(files: Iterable[Path], tokenizer: Tokenizer) -> dict[str, Any]:
    stats = [(str(file), file.stat()) for file in files]
    return {
        "format": _FORMAT,
        "tokenizer": tokenizer.identity,
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }


def _bin_path(fingerprint: dict[str, Any], cache_dir: Path) -> Path:
    digest = hashlib.sha256(json.dumps(fingerprint).encode("utf-8")).hexdigest()
    return cache_dir / f"{digest[:24]}.bin"


def _describe(bin_path: Path) -> tuple[np.dtype, int]:
    description = json.loads(bin_path.with_suffix(".json").read_text())
    return np.dtype(description["dtype"]), description["num_tokens"]
