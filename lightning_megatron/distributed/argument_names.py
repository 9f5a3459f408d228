"""Has classes answer a call with an argument that they do not have, or with one that is not named, with what to write.

Python's own error names the argument; this one names the argument that was meant as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

from lightning_megatron.distributed.wrong_names import unknown_name

C = TypeVar("C", bound=type)


def answer_wrong_names(cls: C, former: Callable[[str, Any], str] | None = None, called: str = "") -> C:
    """Have the constructor of a class answer arguments that it does not have; its signature stays as it is.

    A class decorator; above ``dataclass`` where a class has both. Subclasses with a constructor of their own are
    answered where they call this one.

    Args:
        cls: The class, which has an ``__init__`` without ``**kwargs``. A wrong argument raises ``TypeError``.
        former: Says what to use in place of a former argument, by its name and value; empty for other names.
        called: The name of the class in errors, where users know it by another.
    """
    init = cls.__init__  # type: ignore[misc]
    name = called or cls.__name__

    @cache
    def parameters() -> dict[str, inspect.Parameter]:
        _, *found = inspect.signature(init).parameters.items()  # without self
        return dict(found)

    @wraps(init)
    def answering(self: Any, /, *args: Any, **kwargs: Any) -> None:
        known = parameters()
        if not kwargs.keys() <= known.keys():
            wrong = [key for key in kwargs if key not in known]
            told = [former(key, kwargs[key]) for key in wrong] if former else []
            raise TypeError("\n".join(filter(None, told)) or unknown_name(wrong, known, name))
        places = [key for key, parameter in known.items() if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
        if len(args) > len(places):
            raise TypeError(_unnamed(name, args, places, list(known)))
        init(self, *args, **kwargs)

    cls.__init__ = answering  # type: ignore[misc]
    return cls


def _unnamed(owner: str, args: tuple[Any, ...], places: list[str], known: list[str]) -> str:
    """Say how arguments that may not stand by their place are written."""
    free = [key for key in known if key not in places]
    if not free:
        return (
            f"{owner} takes {len(places)} arguments, {', '.join(places)}; {len(args)} were given. Leave the rest out."
        )
    extra = args[len(places) :]
    written = ", ".join(f"{key}={value!r}" for key, value in zip(free, extra, strict=False))
    return f"{owner} takes its arguments by name, such as {owner}({written}). It has {', '.join(known)}."
