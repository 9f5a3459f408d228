"""Reads the messages, tools and template options of a chat from a row of a dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

# ShareGPT's names of roles, by which its messages have "from" and "value".
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "function": "tool", "observation": "tool"}


@dataclass(frozen=True)
class Chat:
    """A conversation, and what else a chat template reads.

    Args:
        messages: The messages in order, each with a "role" and "content", as chat templates take them.
        prompt: Number of messages at the beginning that belong to the prompt, in which nothing is learnt.
        options: Further arguments of the template, such as "tools" or "enable_thinking".
    """

    messages: list[Message]
    prompt: int
    options: dict[str, Any]


def read_chat(row: Mapping[str, Any], column: str, prompt_column: str | None) -> Chat:
    """Read a row.

    Args:
        row: A row. Its columns "tools" (a list, or its JSON) and "chat_template_kwargs" are given to the template.
        column: The column with the messages.
        prompt_column: The column with the messages before them, if they are apart.

    Raises:
        ValueError: A column holds no messages.
    """
    before = [] if prompt_column is None else _messages(row, prompt_column)
    messages = _messages(row, column)
    options = dict(_without_none(_parsed(row.get("chat_template_kwargs"))) or {})
    if tools := _without_none(_parsed(row.get("tools"))):
        options["tools"] = tools
    return Chat([*before, *messages], len(before), options)


def _messages(row: Mapping[str, Any], column: str) -> list[Message]:
    value = _parsed(row[column])
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, Mapping) for message in value):
        raise ValueError(
            f"ChatDataModule: column {column!r} holds {_short(value)}, and needs a list of messages with 'role' and"
            f" 'content'. Name another of {list(row)}, or use HFDataModule for rows of text."
        )
    return [_message(message, column) for message in value]


def _message(given: Mapping[str, Any], column: str) -> Message:
    message: Message = _without_none(given)
    if "from" in message and "role" not in message:
        role = message.pop("from")
        message = {"role": _ROLES.get(role, role), "content": message.pop("value", ""), **message}
    if "role" not in message:
        raise ValueError(
            f"ChatDataModule: a message of column {column!r} is {_short(given)}, and needs a 'role' and 'content' (or"
            " ShareGPT's 'from' and 'value'). Correct the row."
        )
    message["content"] = _text(message.get("content", ""), column)
    return message


def _text(content: Any, column: str) -> Any:
    """The text of a message's content, which may be in parts."""
    if not isinstance(content, list):
        return content
    other = [part for part in content if not (isinstance(part, Mapping) and part.get("type", "text") == "text")]
    if other:
        raise ValueError(
            f"ChatDataModule: a message of column {column!r} has a part that is no text: {_short(other[0])}. Models"
            " of images and sound are not supported; leave such rows out."
        )
    return "".join(part.get("text") or "" for part in content)


def _parsed(value: Any) -> Any:
    """A list or mapping, which some datasets hold as JSON because its form changes from row to row."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _without_none(value: Any) -> Any:
    """A value without the None that a table puts where a row lacks a field."""
    if isinstance(value, Mapping):
        return {name: _without_none(each) for name, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, (list, tuple)) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
