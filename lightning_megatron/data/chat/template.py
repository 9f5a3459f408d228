"""``Template``: the text and the tokens that a chat template makes of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_megatron.data.chat.messages import Message
from lightning_megatron.data.tokenizers import ChatTokenizer

_Encoded = tuple[list[int], list[tuple[int, int]]]


@dataclass(frozen=True)
class Template:
    """A chat template with its arguments.

    Args:
        tokenizer: The tokenizer.
        source: The template in Jinja; None for the tokenizer's own.
        options: Arguments of the template beside the messages.
    """

    tokenizer: ChatTokenizer
    source: str | None
    options: Mapping[str, Any]

    def text(self, messages: Sequence[Message], begins: bool = False) -> str:
        """The text of messages; with ``begins``, the beginning of an answer follows them."""
        return self.tokenizer.render(messages, begins, self.source, self.options)

    def tokens(self, text: str) -> _Encoded:
        """The ids of a text, and the first character of each with the one behind its last."""
        return self.tokenizer.encode_with_places(text)

    def common(self, one: str, other: str) -> int:
        """Number of characters of the whole tokens with which both texts begin."""
        if other.startswith(one):
            return len(one)
        if one.startswith(other):
            return len(other)
        (ids, places), (others, _) = self.tokens(one), self.tokens(other)
        same = common_length(ids, others)
        return places[same - 1][1] if same else 0


def common_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """Number of ids with which both begin."""
    unlike = (number for number, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other)
    return next(unlike, min(len(ids), len(others)))
