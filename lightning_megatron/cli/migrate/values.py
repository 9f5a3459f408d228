"""Reads values as people write them in YAML, in environment variables and on command lines."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lightning_megatron.cli.migrate.plan import MigrationError

Reader = Callable[[str, Any], Any]

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def whole(name: str, value: Any) -> int:
    """Read a whole number.

    Raises:
        MigrationError: The value is no whole number.
    """
    try:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise MigrationError(f"{name}={value!r}: use a whole number.") from None


def number(name: str, value: Any) -> float:
    """Read a number.

    Raises:
        MigrationError: The value is no number.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        raise MigrationError(f"{name}={value!r}: use a number.") from None


def truth(name: str, value: Any) -> bool:
    """Read true or false, also as a word such as "yes".

    Raises:
        MigrationError: The value is neither.
    """
    word = str(value).strip().lower()
    if word not in _WORDS:
        raise MigrationError(f"{name}={value!r}: use true or false.")
    return _WORDS[word]


def text(name: str, value: Any) -> str:
    """Read a text, such as a name or a path."""
    return str(value)


def words(name: str, value: Any) -> list[str]:
    """Read several texts, as a list or separated by blanks."""
    return [str(word) for word in value] if isinstance(value, list | tuple) else str(value).split()


def numbers(name: str, value: Any) -> list[float]:
    """Read several numbers, as a list or separated by blanks.

    Raises:
        MigrationError: One of them is no number.
    """
    return [number(name, word) for word in words(name, value)]


def shares(name: str, value: Any) -> str:
    """Weights of training, validation and test, as Megatron reads them: the numbers in a text, whatever is between.

    Raises:
        MigrationError: There is none.
    """
    found = re.findall(r"[.0-9]+", str(value))
    if not found:
        raise MigrationError(f"{name}={value!r}: use shares such as 949,50,1.")
    return ",".join(found)


def anything(name: str, value: Any) -> Any:
    """Return the value unchanged."""
    return value


def one_of(*choices: str) -> Reader:
    """Make a reader that accepts one of some words."""

    def read(name: str, value: Any) -> str:
        if str(value) not in choices:
            raise MigrationError(f"{name}={value!r}: use one of {', '.join(choices)}.")
        return str(value)

    return read
