"""Loads tokenizers of three kinds (bytes, the tokenizers library, transformers) behind one small interface."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning_megatron.data.atomic_write import atomic_path
from lightning_megatron.data.text_files import read_text

END_OF_DOCUMENT = "<|endoftext|>"

# The names of the end-of-document token in well-known `tokenizer.json` files; the first one present is taken.
_END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "<eod>", "<eos>", "</s>", "[EOS]", "[SEP]")


@runtime_checkable
class Tokenizer(Protocol):
    """The five members of a tokenizer that this package uses; any object that has them will do.

    If a tokenizer also has ``prefix_ids``, they are put before each text, as its own call puts a BOS.
    """

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eod_id(self) -> int:
        """The id that ends a document."""

    @property
    def identity(self) -> str:
        """A text that two tokenizers share exactly when they encode alike; it names caches of tokens."""

    def encode(self, text: str) -> list[int]:
        """Turn text into ids, without adding special ones."""

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids back into text, leaving special ones out."""


@runtime_checkable
class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer with a chat template, as transformers' fast tokenizers are."""

    @property
    def chat_template(self) -> str | None:
        """The template, in Jinja; None if a template must be given."""

    def render(self, messages: Sequence[Any], begins: bool, template: str | None, options: Mapping[str, Any]) -> str:
        """Make the text of messages by the template; with ``begins``, the beginning of an answer follows them."""

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Turn text into ids, with the first character of each, and the one behind its last."""

    def chat_with_answers(
        self, messages: Sequence[Any], template: str | None, options: Mapping[str, Any]
    ) -> tuple[list[int], list[bool]]:
        """The ids of messages, and whether the template has each between its marks of a generation."""


def begun(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Put before a text's ids what the tokenizer's own call puts there (Llama's ``<s>``), unless they begin with it.

    Args:
        tokenizer: The tokenizer; its ``prefix_ids``, if it has any, begin each text.
        ids: Token ids of the text, which may begin with the prefix already.
    """
    prefix = list(getattr(tokenizer, "prefix_ids", []))
    return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]


def _prefix(called: list[int], ids: list[int]) -> list[int]:
    """The ids that a tokenizer's call has put before the ids of a text."""
    starts = range(len(called) - len(ids) + 1)
    return called[: next((start for start in starts if called[start : start + len(ids)] == ids), 0)]


class ByteTokenizer:
    """Takes the 256 bytes of UTF-8 as ids, and one id for the end of a document. It needs no file."""

    vocab_size = 257
    eod_id = 256
    identity = "bytes"

    def encode(self, text: str) -> list[int]:
        """Turn text into its UTF-8 bytes."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Turn bytes back into text; broken UTF-8, as at the ends of a sample, becomes U+FFFD."""
        return bytes(i for i in ids if i != self.eod_id).decode("utf-8", errors="replace")


class _TokenizersTokenizer:
    """Wraps a ``tokenizers.Tokenizer``."""

    def __init__(self, tokenizer: Any) -> None:
        # It works on a copy without the truncation and padding of `tokenizer.json`, which would cut documents.
        self._tokenizer = type(tokenizer).from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        names = [name for name in _END_OF_DOCUMENT_NAMES if name in vocab]
        if not names:
            raise ValueError(
                f"The tokenizer has none of the end-of-document tokens {list(_END_OF_DOCUMENT_NAMES)} among its "
                f"{len(vocab)} tokens. Add one: `tokenizer.add_special_tokens(['{END_OF_DOCUMENT}'])`."
            )
        self.eod_id = vocab[names[0]]
        self.vocabulary = vocab
        self.vocab_size = max(vocab.values()) + 1
        self.prefix_ids = _prefix(self._tokenizer.encode("a").ids, self.encode("a"))
        self.identity = f"tokenizers:{_digest(self._tokenizer.to_str())}{_begins(self.prefix_ids)}"

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


class _TransformersTokenizer:
    """Wraps a ``transformers`` tokenizer, fast or slow."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # BERT's tokenizers have no end of text, but a separator.
        eod_id = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        if eod_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has neither `eos_token` nor `sep_token` to end a document with. "
                f"Set one: `tokenizer.add_special_tokens({{'eos_token': '{END_OF_DOCUMENT}'}})`."
            )
        vocab: dict[str, int] = tokenizer.get_vocab()
        backend = getattr(tokenizer, "backend_tokenizer", None)  # only fast tokenizers have one
        rules = json.dumps(sorted(vocab.items())) if backend is None else backend.to_str()
        self.eod_id: int = eod_id
        self.vocabulary = vocab
        roles = ("cls", "sep", "mask", "bos", "eos")
        self.special_ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in roles}
        # `len(tokenizer)` would be wrong, since ids may have gaps.
        self.vocab_size = max(vocab.values()) + 1
        self.prefix_ids = _prefix(tokenizer.encode("a"), self.encode("a"))
        template = getattr(tokenizer, "chat_template", None)
        rules += json.dumps(template) if template else ""
        self.identity = f"transformers:{type(tokenizer).__name__}:{eod_id}:{_digest(rules)}{_begins(self.prefix_ids)}"

    def encode(self, text: str) -> list[int]:
        # `verbose=False` silences a warning: documents may be longer than the model's context.
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def chat(self, messages: list[Any], answers: bool) -> list[int]:
        """The ids of a chat by the tokenizer's template; with ``answers``, an answer's beginning is added."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError(
                f"{type(self._tokenizer).__name__} has no chat_template, by which messages become text. Set one, or"
                " make a column of text."
            )
        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=answers, return_dict=False)
        return list(ids)

    @property
    def chat_template(self) -> str | None:
        template = getattr(self._tokenizer, "chat_template", None)
        return template["default"] if isinstance(template, dict) else template  # of several, by name

    def render(self, messages: Sequence[Any], begins: bool, template: str | None, options: Mapping[str, Any]) -> str:
        return str(self._apply(messages, template, {**options, "tokenize": False, "add_generation_prompt": begins}))

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"{type(self._tokenizer).__name__} is written in Python, and does not tell which characters a token"
                " is of. Use a tokenizer with a tokenizer.json."
            )
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(found["input_ids"]), list(found["offset_mapping"])

    def chat_with_answers(
        self, messages: Sequence[Any], template: str | None, options: Mapping[str, Any]
    ) -> tuple[list[int], list[bool]]:
        asked = {**options, "return_dict": True, "return_assistant_tokens_mask": True}
        found = self._apply(messages, template, asked)
        return list(found["input_ids"]), [bool(on) for on in found["assistant_masks"]]

    def _apply(self, messages: Sequence[Any], template: str | None, options: Mapping[str, Any]) -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(list(messages), chat_template=template, **options)
        except (TemplateError, TypeError, KeyError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(
                f"The chat template of {type(self._tokenizer).__name__} refuses messages of {roles}:"
                f" {str(error).rstrip('.')}. Correct the row, or give another chat_template."
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(source: str | Path | object) -> Tokenizer:
    """Load or wrap a tokenizer.

    Args:
        source: ``"bytes"``, the path of a ``tokenizer.json``, a folder saved by transformers, the name of a model on
            the Hugging Face hub, or a tokenizer object: this module's, tokenizers' or transformers'.

    Raises:
        FileNotFoundError: ``source`` is a path and nothing is there.
        ValueError: transformers cannot load ``source``, or the tokenizer has no end-of-document token.
        TypeError: ``source`` is not a tokenizer.
    """
    if source == "bytes":
        return ByteTokenizer()
    if isinstance(source, (str, Path)):
        return _load_from_files(source)
    if isinstance(source, Tokenizer):
        return source
    if hasattr(source, "eos_token_id"):
        return _TransformersTokenizer(source)
    if hasattr(source, "to_str"):
        return _TokenizersTokenizer(source)
    raise TypeError(
        f"{source!r} is no tokenizer. Give 'bytes', the path of a tokenizer.json, a transformers folder or name, or an "
        "object with `vocab_size`, `eod_id`, `identity`, `encode` and `decode`."
    )


def train_bpe(files: Sequence[str | Path], vocab_size: int, path: str | Path) -> Path:
    """Train a byte-level BPE tokenizer, which can encode every text, and write its ``tokenizer.json``.

    Args:
        files: The text files to train on.
        vocab_size: The largest number of ids: 256 bytes, the end of document and the merges. Small corpora have fewer.
        path: The ``tokenizer.json`` to write.

    Returns:
        ``path``, for ``TextDataModule(tokenizer=...)``.

    Raises:
        ValueError: ``vocab_size`` has no room for the bytes, or ``path`` does not end in ``.json``.
    """
    return train_bpe_on((read_text(Path(file)) for file in files), vocab_size, path)


def train_bpe_on(texts: Iterable[str], vocab_size: int, path: str | Path, special: Sequence[str] = ()) -> Path:
    """Train a tokenizer as :func:`train_bpe` does, on texts that are not in files.

    Args:
        texts: The texts to train on.
        vocab_size: The largest number of ids, as for :func:`train_bpe`, including ``special``.
        path: The ``tokenizer.json`` to write.
        special: Further special tokens, such as BERT's.

    Returns:
        ``path``.

    Raises:
        ValueError: ``vocab_size`` is too small, or ``path`` does not end in ``.json``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path = Path(path)
    least = ByteTokenizer.vocab_size + len(special)
    if vocab_size < least:
        more = f", and {len(special)} special tokens ({special[0]} to {special[-1]})" if special else ""
        raise ValueError(
            f"A byte-level BPE of vocab_size={vocab_size} has no room for 256 bytes and the end of document{more}."
            f" Use {least} or more."
        )
    if path.suffix != ".json":
        raise ValueError(
            f"train_bpe(path='{path}'): the name must end in .json; `load_tokenizer` takes other names for a model."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT, *special],
        # It has every byte, also those that the texts lack, so that it can encode every text.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        tokenizer.save(str(temporary))
    return path


def _load_from_files(source: str | Path) -> Tokenizer:
    path = Path(source).expanduser()
    if path.suffix == ".json" and path.is_file():
        from tokenizers import Tokenizer

        return _TokenizersTokenizer(Tokenizer.from_file(str(path)))
    # A hub name is "name" or "owner/name"; anything else must be meant as a path.
    looks_like_path = isinstance(source, Path) or path.suffix == ".json" or source.startswith((".", "/", "~"))
    if looks_like_path and not path.is_dir():
        raise FileNotFoundError(
            f"There is no tokenizer at {path} (seen from {Path.cwd()}). Give the path of a tokenizer.json, a folder "
            "saved by transformers, or 'bytes', which needs no file."
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path) if looks_like_path else source)
    except (OSError, ValueError) as error:  # transformers raises these for all three reasons below
        raise ValueError(
            f"transformers cannot load a tokenizer from '{source}': there is no such folder, or no such name on the "
            "hub, or the hub is out of reach. Give a folder that holds tokenizer files, or 'bytes'."
        ) from error
    return _TransformersTokenizer(tokenizer)


def _begins(prefix: list[int]) -> str:
    """The prefix as a part of ``identity``; empty without a prefix, so that caches of older versions stay valid."""
    return f":begins with {prefix}" if prefix else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
