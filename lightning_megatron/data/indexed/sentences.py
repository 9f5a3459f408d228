"""Text split into sentences, and items no longer than megatron-core's datasets take."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Behind a full stop and the like, with what closes around it, also without a space, as in Chinese; between paragraphs.
_END = re.compile(r"""(?<=[.!?…])\s+|(?<=[.!?…]["'”’)\]])\s+|(?<=[。！？])\s*|\n\s*\n\s*""")


def split_sentences(text: str) -> list[str]:
    """Splits a text at the ends of sentences and paragraphs.

    By punctuation alone: it takes "Dr. Who" for the end of one. Who knows better gives sentences of their own, as lists
    of strings in JSONL.

    Returns:
        The sentences, without the space around them; none is empty.
    """
    return [sentence for part in _END.split(text) if (sentence := part.strip())]


def pieces(ids: list[int], longest: int) -> Iterator[list[int]]:
    """The ids in runs of up to ``longest``."""
    for start in range(0, len(ids), longest):
        yield ids[start : start + longest]
