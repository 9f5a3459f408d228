"""Checks of a batch that several adapters make."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def check_tokens(module: str, name: str, ids: torch.Tensor) -> None:
    """Refuse what is no table of token ids.

    Args:
        module: Who refuses.
        name: Key of the batch.
        ids: Its value.

    Raises:
        ValueError: It is no tensor of integers ``[b, s]``, or has no token.
    """
    seen = f"{list(ids.shape)} of {ids.dtype}" if isinstance(ids, torch.Tensor) else f"a {type(ids).__name__}"
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise ValueError(
            f"{module}: {name!r} is {seen}. It takes token ids, a tensor of integers [b, s] with a token or more; pad"
            " and stack the samples in the collate function."
        )


def check_alike(module: str, batch: Mapping[str, torch.Tensor], name: str, other: str) -> None:
    """Refuse one key whose shape is not another's.

    Raises:
        ValueError: With both shapes.
    """
    if name in batch and batch[name].shape != batch[other].shape:
        raise ValueError(
            f"{module}: {name!r} is {tuple(batch[name].shape)} and {other!r} {tuple(batch[other].shape)}; each token"
            " has one."
        )


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
