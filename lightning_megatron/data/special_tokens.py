"""Finds the ids of the special tokens that BERT's and T5's data need."""

from __future__ import annotations

from typing import Any

from lightning_megatron.data.tokenizers import Tokenizer

# The names of special tokens in well-known vocabularies, for tokenizers that do not name them; the first one present
# is taken.
_NAMES = {
    "cls": ("[CLS]", "<s>", "<cls>"),
    "sep": ("[SEP]", "</s>", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
    "bos": ("[BOS]", "<s>", "<bos>", "[PAD]", "<pad>"),  # T5's decoder starts with the padding token
    "eos": ("[EOS]", "</s>", "<eos>", "<|endoftext|>"),
}


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """The vocabulary of a tokenizer: the ids by their tokens.

    Raises:
        ValueError: The tokenizer has no named tokens.
    """
    known = getattr(tokenizer, "vocabulary", None)
    if known is None:
        raise ValueError(
            f"BERT's and T5's data take a tokenizer with named tokens, and {type(tokenizer).__name__} has none. Use a"
            " tokenizer.json or a transformers folder, or give your tokenizer a `vocabulary`: tokens and their ids."
        )
    return dict(known)


def special_ids(tokenizer: Tokenizer, *roles: str) -> dict[str, int]:
    """The ids of the special tokens for ``roles``, which are among "cls", "sep", "mask", "bos" and "eos".

    Raises:
        ValueError: The tokenizer lacks one of them.
    """
    tokens = vocabulary(tokenizer)
    own: dict[str, Any] = getattr(tokenizer, "special_ids", {})
    found = {role: _id(role, tokens, own) for role in roles}
    missing = [role for role, id_ in found.items() if id_ is None]
    if missing:
        role = missing[0]
        raise ValueError(
            f"The tokenizer ({len(tokens)} tokens) lacks a {role!r} token: none of {', '.join(_NAMES[role])} is in its"
            f" vocabulary. Add one, such as {_NAMES[role][0]!r}, before the data are made."
        )
    return {role: id_ for role, id_ in found.items() if id_ is not None}


def _id(role: str, tokens: dict[str, int], own: dict[str, Any]) -> int | None:
    if own.get(role) is not None:
        return int(own[role])
    return next((tokens[name] for name in _NAMES[role] if name in tokens), None)
