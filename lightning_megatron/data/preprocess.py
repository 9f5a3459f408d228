"""Makes indexed data from text files and JSONL with several processes: ``lightning-megatron preprocess``."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from lightning_megatron.data.indexed.files import IndexedWriter, writing
from lightning_megatron.data.indexed.samples import LONGEST_SENTENCE
from lightning_megatron.data.indexed.sentences import pieces, split_sentences
from lightning_megatron.data.text_files import find_text_files, lone_surrogate, read_text
from lightning_megatron.data.tokenizers import Tokenizer, load_tokenizer, train_bpe_on

# The special tokens that BERT's and T5's samples need in a tokenizer that is trained here.
SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"<extra_id_{number}>" for number in range(100)))

_DOCUMENTS_AT_ONCE = 16
_NAMED = 5  # the number of empty documents that the summary names


class Document(NamedTuple):
    """One document of the input: its file and line, its texts by their keys, and the bytes read for it."""

    place: str
    texts: dict[str, Any]
    size: int


# An encoded document: its file and line, the bytes read for it, and its items by their keys.
_Encoded = tuple[str, int, dict[str, list[list[int]]]]


@dataclass
class Summary:
    """A summary of the files written for one key.

    Args:
        prefix: Path of the written files, without their ending.
        documents: Number of documents.
        tokens: Number of tokens.
        empty: Files and lines of empty documents, which were left out.
    """

    prefix: Path
    documents: int = 0
    tokens: int = 0
    empty: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        said = f"{self.prefix}: {self.documents:,} documents, {self.tokens:,} tokens"
        if self.empty:
            more = f" and {len(self.empty) - _NAMED} more" if len(self.empty) > _NAMED else ""
            said += f"; left out {len(self.empty)} empty documents: {', '.join(self.empty[:_NAMED])}{more}"
        return said


def preprocess(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path | Tokenizer = "bytes",
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    sentences: bool = False,
    workers: int = 1,
    suffixes: Sequence[str] = (".txt", ".md", ".py", ".jsonl"),
    progress: bool = True,
) -> list[Summary]:
    """Write ``.bin`` and ``.idx`` files with megatron-core's builder; they appear when they are complete.

    Each line of a ``.jsonl`` or ``.json`` file is a document; any other file is one document. Documents keep their
    order. Empty ones are left out, and named in the summary.

    Args:
        inputs: Files and folders.
        out: Prefix of the files to write. With several ``json_keys``, ``_KEY`` is added to it.
        tokenizer: ``"bytes"``, the path of a ``tokenizer.json``, a transformers folder or hub name, or a tokenizer.
        json_keys: Keys of the objects in the lines; each key has its own files. A value is a text, or a list of the
            text's sentences.
        append_eod: Whether each document ends with the tokenizer's end-of-document id, which GPT's data need.
        sentences: Whether each sentence is an item, which BERT's and T5's samples need. Sentences of more than 512
            tokens are cut, because megatron-core would leave out their whole document.
        workers: Number of processes that tokenise.
        suffixes: The endings of the files to take from folders.
        progress: Whether a bar shows the bytes that have been read.

    Returns:
        One summary for each key.

    Raises:
        FileNotFoundError: An input does not exist.
        ValueError: A line is no such object, or all documents are empty.
    """
    files = find_text_files(list(inputs), suffixes)
    prefixes = {key: Path(f"{out}_{key}" if len(json_keys) > 1 else out) for key in json_keys}
    encoder = _Encoder(load_tokenizer(tokenizer), append_eod, sentences)
    summaries = {key: Summary(prefix) for key, prefix in prefixes.items()}
    with ExitStack() as stack:
        vocab_size = encoder.tokenizer.vocab_size
        writers = {key: stack.enter_context(writing(prefix, vocab_size)) for key, prefix in prefixes.items()}
        total = sum(file.stat().st_size for file in files)
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc=str(out)))
        documents = chain.from_iterable(_documents(file, json_keys) for file in files)
        for place, size, encoded in _encode(documents, encoder, workers):
            for key, items in encoded.items():
                _add(writers[key], summaries[key], place, items)
            bar.update(size)
        for key, summary in summaries.items():
            summary.documents, summary.tokens = writers[key].documents, writers[key].tokens
    return list(summaries.values())


def train_tokenizer(
    inputs: Sequence[str | Path],
    vocab_size: int,
    path: str | Path,
    json_keys: Sequence[str] = ("text",),
    suffixes: Sequence[str] = (".txt", ".md", ".py", ".jsonl"),
) -> Path:
    """Train a byte-level BPE on the inputs of :func:`preprocess`, with the special tokens of BERT and T5.

    Args:
        inputs: Files and folders.
        vocab_size: The largest number of ids; 361 or more.
        path: The ``tokenizer.json`` to write.
        json_keys: Keys of the objects in the lines.
        suffixes: The endings of the files to take from folders.

    Returns:
        ``path``.
    """
    files = find_text_files(list(inputs), suffixes)
    documents = chain.from_iterable(_documents(file, json_keys) for file in files)
    texts = (" ".join(_texts(value)) for document in documents for value in document.texts.values())
    return train_bpe_on(texts, vocab_size, path, SPECIAL_TOKENS)


class _Encoder:
    """Makes the items of a document."""

    def __init__(self, tokenizer: Tokenizer, append_eod: bool, sentences: bool) -> None:
        self.tokenizer = tokenizer
        self.append_eod = append_eod
        self.sentences = sentences

    def __call__(self, document: Document) -> _Encoded:
        try:
            items = {key: self._items(value) for key, value in document.texts.items()}
        except (ValueError, TypeError) as error:  # the tokenizer may be the user's own
            raise ValueError(f"{document.place} cannot be tokenised: {error}") from error
        return document.place, document.size, items

    def _items(self, value: Any) -> list[list[int]]:
        if not self.sentences:
            found = [self.tokenizer.encode(" ".join(_texts(value)))]
        else:
            sentences = split_sentences(value) if isinstance(value, str) else value
            longest = LONGEST_SENTENCE - self.append_eod
            found = [piece for s in sentences for piece in pieces(self.tokenizer.encode(s), longest)]
        found = [item for item in found if item]
        if found and self.append_eod:
            found[-1].append(self.tokenizer.eod_id)
        return found


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _documents(file: Path, json_keys: Sequence[str]) -> Iterator[Document]:
    if file.suffix not in (".jsonl", ".json"):
        yield Document(str(file), {json_keys[0]: read_text(file)}, file.stat().st_size)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Document(f"{file}:{number}", _from_json(line, f"{file}:{number}", json_keys), len(line))


def _from_json(line: bytes, place: str, keys: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line.strip())
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise ValueError(f"{place} is no JSON: {error}. Each line of a .jsonl or .json file is an object.") from None
    for key in keys:
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            if isinstance(row, dict) and key in row:
                raise ValueError(
                    f"{place}: {key!r} is {type(value).__name__}, and not a text or a list of texts. Correct the"
                    " line, or name another key with --json-keys."
                )
            seen = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{place} has no text under {key!r}, but {seen}. Name the right key with --json-keys.")
        for text in _texts(value):
            if (half := lone_surrogate(text)) is not None:
                raise ValueError(
                    f"{place}: {key!r} has {half}, half of a surrogate pair, which is no character. Correct the line."
                )
    return {key: row[key] for key in keys}


def _add(writer: IndexedWriter, summary: Summary, place: str, items: list[list[int]]) -> None:
    if items:
        writer.add(items, place)
    else:
        summary.empty.append(place)


def _encode(documents: Iterator[Document], encoder: _Encoder, workers: int) -> Iterator[_Encoded]:
    """Yield the encoded documents in their order."""
    if workers == 1:
        yield from map(encoder, documents)
        return
    with ProcessPoolExecutor(workers, initializer=_take, initargs=(encoder,)) as pool:
        waiting: deque[Future[list[_Encoded]]] = deque()
        try:
            while batch := list(islice(documents, _DOCUMENTS_AT_ONCE)):
                waiting.append(pool.submit(_encode_all, batch))
                if len(waiting) > 4 * workers:  # so that the whole input is never in memory
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "A tokenising process was killed, as happens where memory runs out. Use fewer workers."
            ) from None


_worker: _Encoder | None = None


def _take(encoder: _Encoder) -> None:
    global _worker
    _worker = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process uses one thread, since threads do not survive a fork


def _encode_all(documents: list[Document]) -> list[_Encoded]:
    assert _worker is not None
    return [_worker(document) for document in documents]
