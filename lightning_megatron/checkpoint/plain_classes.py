"""Declares classes whose objects are only data: a checkpoint that nobody trusts may hold them, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

C = TypeVar("C", bound=type)
# Classes, and classes with the full name that older checkpoints have for them.
declared_plain: list[type | tuple[type, str]] = []


def plain_class(cls: C) -> C:
    """Declare that objects of a class are only data, and may be loaded from any checkpoint."""
    declared_plain.append(cls)
    return cls


def formerly_in(module: str) -> Callable[[C], C]:
    """Load a plain class from checkpoints that were written when it was defined in another module.

    A checkpoint names the class of an object by its module.
    """

    def declared(cls: C) -> C:
        declared_plain.append((cls, f"{module}.{cls.__qualname__}"))
        return cls

    return declared
