"""Splits text into sentences, and cuts items that are too long for megatron-core's datasets."""

from __future__ import annotations

import re
from collections.abc import Iterator

# The end of a sentence: after a full stop and the like, perhaps with a closing quote or bracket (Chinese has no space
# there), and between paragraphs.
_END = re.compile(r"""(?<=[.!?…])\s+|(?<=[.!?…]["'”’)\]])\s+|(?<=[。！？])\s*|\n\s*\n\s*""")


def split_sentences(text: str) -> list[str]:
    """Split a text at the ends of sentences and paragraphs.

    It goes by punctuation only, so it splits "Dr. Who". For better sentences, give lists of strings in JSONL.

    Returns:
        The sentences, without the space around them; none is empty.
    """
    return [sentence for part in _END.split(text) if (sentence := part.strip())]


def pieces(ids: list[int], longest: int) -> Iterator[list[int]]:
    """Yield the ids in pieces of up to ``longest``."""
    for start in range(0, len(ids), longest):
        yield ids[start : start + longest]
