"""Finds what an error text suggests: the nearest sizes that work, or the name that was probably meant."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence


def closest_name(name: str, known: Iterable[str], similarity: float = 0.5) -> str | None:
    """Return the known name that is most like ``name``, whatever is upper case in either.

    Args:
        name: A name that does not exist.
        known: The names that exist.
        similarity: How alike the two have to be, from 0 (any will do) to 1 (equal).

    Returns:
        None if no known name is similar enough.
    """
    plain = {each.lower().replace("-", "_"): each for each in known}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), list(plain), n=1, cutoff=similarity)
    return plain[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str], similarity: float = 0.5) -> str:
    """Return the sentence " Did you mean 'x'?" with the closest known name; empty if none is similar enough."""
    found = closest_name(name, known, similarity)
    return "" if found is None else f" Did you mean {found!r}?"


def is_positive_int(size: object) -> bool:
    """Whether ``size`` is a whole number from 1; True and False are none."""
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def not_positive(name: str, size: object, smallest: int = 1) -> str:
    """Say that an argument is no positive integer, and what to use."""
    return f"{name}={size!r} is not a positive integer. Use {name}={smallest} or more."


def divisors(size: int) -> list[int]:
    """Return all divisors of ``size`` in rising order."""
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return sorted({*small, *(size // d for d in small)})


def nearest_multiples(size: int, unit: int) -> list[int]:
    """Return the multiples of ``unit`` next below and next above ``size``; below is left out where it is 0."""
    below = (size - 1) // unit * unit
    return [multiple for multiple in (below, size // unit * unit + unit) if multiple > 0]


def nearest(size: int, candidates: Sequence[int], works: Callable[[int], bool] = bool) -> list[int]:
    """Return the candidates (in rising order) next below and next above ``size`` that work."""
    below = next((c for c in reversed(candidates) if c < size and works(c)), None)
    above = next((c for c in candidates if c > size and works(c)), None)
    return [c for c in (below, above) if c is not None]


def choices(name: str, sizes: Sequence[int]) -> str:
    """Write the sizes as alternatives: "tp=2 or tp=4"."""
    return " or ".join(f"{name}={size}" for size in sizes)


def use(*alternatives: str) -> str:
    """Write the closing advice; alternatives that have nothing to offer are empty and left out."""
    return f"Use {', or '.join(filter(None, alternatives))}."
