"""Finds the assistant's answers in the text that a chat template makes of a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_megatron.data.chat.messages import Message
from lightning_megatron.data.chat.template import Template

Span = tuple[int, int]  # the first character, and the one behind the last

_MARK = "\ue000"  # a character for private use, which no text has


def find_answer(text: str, messages: Sequence[Message], number: int, template: Template) -> Span:
    """Find what the model writes when it is asked for the assistant's message ``number``.

    It begins where the template leaves off when it is asked for the beginning of an answer, and ends, with its
    end-of-turn token, where the next message begins.

    Args:
        text: The text of all messages.
        messages: The messages.
        number: The number of a message of the assistant.
        template: The template that has made the text.

    Raises:
        ValueError: The template writes earlier messages otherwise when more messages follow, so that an answer's place
            cannot be found.
    """
    return _start(text, messages, number, template), _end(text, messages, number, template)


def _start(text: str, messages: Sequence[Message], number: int, template: Template) -> int:
    """Where the beginning of an answer ends; of what such a beginning adds (``<think>``), the text may lack some."""
    before = messages[:number]
    if not before:
        return max(0, template.text([{**messages[0], "content": _MARK}]).find(_MARK))
    told, begun = _beginning(before, template)
    if not text.startswith(told):
        raise _lost(number)
    return len(told) + template.common(begun, text[len(told) :])


def _end(text: str, messages: Sequence[Message], number: int, template: Template) -> int:
    before, answer, after = messages[:number], messages[number], messages[number + 1 :]
    if not after:
        return len(text)
    upto = template.text([*before, answer])
    if text.startswith(upto):
        return len(upto)
    # The template writes the last answer otherwise than earlier ones, for example with its reasoning. Where another
    # text stands in the answer's place, all behind that place is the same.
    marked = {**answer, "content": _MARK}
    behind = template.text([*before, marked, *after]).partition(_MARK)[2]
    told, _ = _beginning([*before, marked], template)
    end_of_turn = told.partition(_MARK)[2]
    if not (behind.startswith(end_of_turn) and text.endswith(behind)):
        raise _lost(number)
    return len(text) - len(behind) + len(end_of_turn)


def _beginning(messages: Sequence[Message], template: Template) -> tuple[str, str]:
    """The text of messages when an answer is to follow, and the beginning of that answer."""
    opened = template.text(messages, begins=True)
    told = template.common(opened, template.text(messages))
    return opened[:told], opened[told:]


def _lost(number: int) -> ValueError:
    return ValueError(
        f"ChatDataModule: the chat template writes what comes before message {number} otherwise when more messages"
        " follow, so the place of the assistant's answer is unknown. Give a chat_template with {% generation %} and"
        " {% endgeneration %} around the answers, or use loss_on='last'."
    )
