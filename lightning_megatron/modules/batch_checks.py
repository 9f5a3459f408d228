"""Checks of a batch that several adapters make."""

from __future__ import annotations

import torch


def check_range(module: str, name: str, ids: torch.Tensor, size: int, setting: str) -> None:
    """Refuse numbers of a batch that a table of the model has no row for.

    Args:
        module: Who refuses.
        name: Key of the batch.
        ids: Its value, without labels that are ignored.
        size: Rows of the table.
        setting: Where that comes from.

    Raises:
        ValueError: With the first of them.
    """
    wrong = ids[(ids < 0) | (ids >= size)]
    if wrong.numel():
        raise ValueError(
            f"{module}: {int(wrong[0])} in {name!r} is outside of 0 to {size - 1}, as {setting}={size} has it. Correct"
            " the data or the number; a vocabulary's is the tokenizer's own."
        )
