"""Reads words that an argument separates by commas."""

from __future__ import annotations

import argparse


def words(text: str) -> list[str]:
    """The words of ``A,B``.

    Raises:
        ArgumentTypeError: There is none.
    """
    found = [word for part in text.split(",") if (word := part.strip())]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing; give one, or several as A,B")
    return found
