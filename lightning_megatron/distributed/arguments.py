"""Checks the arguments of a call; an error says the argument's name, its value and what to use."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


class Arguments:
    """Checks the arguments of one call.

    Args:
        of: Name of the class or function that is called; errors begin with it.
        error: The exception type to raise.
    """

    def __init__(self, of: str, error: type[Exception] = ValueError) -> None:
        self._of = of
        self._error = error

    def whole(self, least: int | None = 1, *, optional: bool = False, **values: Any) -> None:
        """Refuse values that are no whole number, or below ``least``; None is accepted if ``optional``."""
        for name, value in values.items():
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not (is_whole and (least is None or value >= least)) and not (optional and value is None):
                self._refuse(name, value, "a whole number" + ("" if least is None else f" from {least}"), optional)

    def number(
        self,
        *,
        above: float | None = None,
        least: float | None = None,
        at_most: float | None = None,
        below: float | None = None,
        optional: bool = False,
        **values: Any,
    ) -> None:
        """Refuse values that are no finite number, or out of bounds; None is accepted if ``optional``."""
        bounds = {"above": above, "from": least, "up to": at_most, "below": below}
        text = " ".join(["a number", *(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)])
        for name, value in values.items():
            if optional and value is None:
                continue
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not (
                fits
                and (above is None or value > above)
                and (least is None or value >= least)
                and (at_most is None or value <= at_most)
                and (below is None or value < below)
            ):
                self._refuse(name, value, text, optional)

    def flag(self, *, optional: bool = False, **values: Any) -> None:
        """Refuse values that are neither True nor False; None is accepted if ``optional``."""
        for name, value in values.items():
            if not isinstance(value, bool) and not (optional and value is None):
                self._refuse(name, value, "True or False", optional)

    def names(self, *, optional: bool = False, **values: Any) -> None:
        """Refuse values that are no list of strings; None is accepted if ``optional``."""
        for name, value in values.items():
            fits = isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)
            if not fits and not (optional and value is None):
                self._refuse(name, value, "a list of names", optional)

    def kind(self, of: type | tuple[type, ...], called: str, *, optional: bool = False, **values: Any) -> None:
        """Refuse values of other types than ``of``, which errors call ``called``; None is accepted if ``optional``."""
        for name, value in values.items():
            if not isinstance(value, of) and not (optional and value is None):
                self._refuse(name, value, called, optional)

    def one_of(self, known: Iterable[Any], **values: Any) -> None:
        """Refuse values that are not among the ``known`` ones."""
        choices = list(known)
        for name, value in values.items():
            if value not in choices:
                self._refuse(name, value, " or ".join(map(repr, choices)), optional=False)

    def _refuse(self, name: str, value: Any, use: str, optional: bool) -> None:
        raise self._error(f"{self._of}({name}={value!r}): use {use}{', or None' if optional else ''}.")
