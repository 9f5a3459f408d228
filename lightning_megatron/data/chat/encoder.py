"""``ChatEncoder``: the token ids of a conversation, with labels on the assistant's answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from typing_extensions import override

from lightning_megatron.data.chat.answers import Span, find_answer
from lightning_megatron.data.chat.messages import Chat, read_chat
from lightning_megatron.data.chat.template import Template, common_length
from lightning_megatron.data.collators.padding import IGNORED_LABEL
from lightning_megatron.data.huggingface.dataset_source import check_column
from lightning_megatron.data.huggingface.row_encoder import RowEncoder
from lightning_megatron.data.tokenizers import ChatTokenizer

LossOn = Literal["assistant", "last", "all"]

# To be raised when the same rows give other tokens than before.
_FORMAT = 1
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class ChatEncoder(RowEncoder):
    """Makes the tokens of a conversation by a chat template.

    Args:
        tokenizer: The tokenizer, which has a chat template unless one is given.
        messages_column: The column with the messages.
        prompt_column: The column with messages before them, in which nothing is learnt.
        loss_on: "assistant": every answer is learnt, "last": the last one, "all": every token.
        chat_template: A template in place of the tokenizer's.
        template_options: Further arguments of the template; a row's own "chat_template_kwargs" come before them.
        max_length: Number of tokens at which a conversation is cut off.
    """

    tokenizer: ChatTokenizer
    messages_column: str
    prompt_column: str | None
    loss_on: LossOn
    chat_template: str | None
    template_options: Mapping[str, Any] = field(hash=False)
    max_length: int

    @override
    def check(self, columns: Sequence[str]) -> None:
        check_column(self.messages_column, columns, "messages_column", "ChatDataModule")
        if self.prompt_column is not None:
            check_column(self.prompt_column, columns, "prompt_column", "ChatDataModule")

    @override
    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Make ``input_ids`` and ``labels``; None if no token of the first ``max_length`` is learnt."""
        ids, learnt = self.encode(row)
        labels = [id_ if on else IGNORED_LABEL for id_, on in zip(ids, learnt, strict=True)]
        labels = labels[: self.max_length]
        # The first token of a row has nothing before it that would predict it.
        if all(label == IGNORED_LABEL for label in labels[1:]):
            return None
        return {"input_ids": ids[: self.max_length], "labels": labels}

    def encode(self, row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        """The ids of a whole conversation, and whether each is learnt.

        Raises:
            ValueError: The row has no messages, or the template refuses them.
        """
        chat = read_chat(row, self.messages_column, self.prompt_column)
        if not chat.messages:
            return [], []
        template = Template(self.tokenizer, self.chat_template, {**self.template_options, **chat.options})
        if self.loss_on != "all" and self._is_marked:
            ids, learnt = self.tokenizer.chat_with_answers(chat.messages, template.source, template.options)
            learnt = _last_run(learnt) if self.loss_on == "last" else learnt
        else:
            text = template.text(chat.messages)
            ids, places = template.tokens(text)
            spans = self._spans(text, chat, template)
            learnt = [any(a < stop and b > start for start, stop in spans) for a, b in places]
        begun = _length_of_prompt(chat, ids, template)
        return ids, [on and number >= begun for number, on in enumerate(learnt)]

    @property
    @override
    def identity(self) -> tuple[Any, ...]:
        how = (self.loss_on, self.chat_template, sorted(self.template_options.items()), self.max_length)
        return ("chat", _FORMAT, self.tokenizer.identity, self.messages_column, self.prompt_column, *how)

    @property
    @override
    def names(self) -> list[str]:
        return ["input_ids", "labels"]

    @cached_property
    def _is_marked(self) -> bool:
        """Whether the template itself says what an answer is."""
        return bool(_MARKED.search(self.chat_template or self.tokenizer.chat_template or ""))

    def _spans(self, text: str, chat: Chat, template: Template) -> list[Span]:
        """The parts of the text that are learnt."""
        if self.loss_on == "all":
            return [(0, len(text))]
        messages = chat.messages
        numbers = [n for n, message in enumerate(messages) if message["role"] == "assistant" and n >= chat.prompt]
        if self.loss_on == "last":
            numbers = numbers[-1:]
        return [find_answer(text, messages, number, template) for number in numbers]


def _last_run(learnt: list[bool]) -> list[bool]:
    """Of the tokens that are learnt, those that follow the last one that is not."""
    stop = max((n for n, on in enumerate(learnt) if on), default=-1) + 1
    start = max((n for n, on in enumerate(learnt[:stop]) if not on), default=-1) + 1
    return [start <= n < stop for n in range(len(learnt))]


def _length_of_prompt(chat: Chat, ids: list[int], template: Template) -> int:
    """Number of ids that the prompt, with the beginning of an answer, has in common with the whole."""
    if not chat.prompt:
        return 0
    prompt, _ = template.tokens(template.text(chat.messages[: chat.prompt], begins=True))
    return common_length(prompt, ids)
