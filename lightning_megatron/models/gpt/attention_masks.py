"""Decides which earlier tokens a GPT's queries look at, by the masks and positions of a batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from lightning_megatron.models.gpt.config import GPTConfig
from lightning_megatron.models.gpt.packed_documents import apart_by_positions
from lightning_megatron.models.megatron_module import Batch

# Added to a score, this leaves nothing of it in any precision.
_NEVER = -1e4


def is_whole(batch: Batch) -> bool:
    """Whether the batch has transformers' mask of queries and keys, which says everything, looking ahead included."""
    mask = batch.get("attention_mask")
    return mask is not None and "input_ids" in batch and mask.dim() == 4


def unseen(mask: torch.Tensor) -> torch.Tensor | None:
    """transformers' ``attention_mask``, turned over: True where a key is not looked at; None where all are."""
    if mask.dim() == 4:
        return mask != 0 if mask.is_floating_point() else ~mask
    return None if bool(mask.all()) else ~mask.bool()[:, None, None, :]


def joined(masks: Sequence[torch.Tensor | None], whole: bool) -> torch.Tensor | None:
    """``[b, 1, s, s]``, True where a query may not look.

    A query that may look nowhere, of padding in front, gets zeros from attention, as in transformers.

    Args:
        masks: True where one says so, ``[b, 1, s or 1, s]``.
        whole: Whether they say all; otherwise nobody looks ahead, either.

    Returns:
        None where nothing but what lies ahead is unseen, which attention has a faster way for.
    """
    found = [mask for mask in masks if mask is not None]
    if not found:
        return None
    blocked = functools.reduce(torch.logical_or, found)
    length = blocked.size(-1)
    return blocked if whole else blocked | torch.ones(length, length, dtype=torch.bool, device=blocked.device).triu(1)


def check(config: GPTConfig, batch: Batch, name: str, length: int) -> None:
    """Refuse a mask of a shape that nobody reads, and what the layers cannot keep apart.

    Args:
        config: Configuration of the model.
        batch: The batch of the loader.
        name: Key of the batch's tokens.
        length: Number of tokens of a row.

    Raises:
        ValueError: A value is wrong; the message has it.
    """
    mask, rows = batch.get("attention_mask"), batch[name].size(0)
    shapes = [(rows, 1, length, length)] + [(rows, length)] * (name == "input_ids")
    if mask is not None and tuple(mask.shape) not in shapes:
        raise ValueError(
            f"GPTModule: 'attention_mask' is {tuple(mask.shape)}; with {name!r} of {rows} rows of {length} tokens it"
            f" is {' or '.join(map(str, shapes))}."
        )
    if is_whole(batch):
        _check_whole(config, batch["attention_mask"])
    if config.layers != "torch" and (what := _beyond_causal(batch)):
        raise ValueError(
            f"GPTModule: {what}, with GPTConfig(layers={config.layers!r}), whose attention looks at all earlier tokens."
            " Use layers='torch', or pad behind the text."
        )


def _beyond_causal(batch: Batch) -> str:
    """Name what in the batch hides earlier tokens from a token that has a label."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is None:
        apart = positions is not None and apart_by_positions(positions) is not None
        return "'position_ids' that begin documents" if apart else ""
    only_ends = mask.dim() == 2 and bool((mask.bool().long().diff(dim=1) <= 0).all())
    return "" if only_ends else "this 'attention_mask'"


def _check_whole(config: GPTConfig, mask: torch.Tensor) -> None:
    """Refuse numbers on the scores that are no mask, and a window beside it, which transformers leaves out."""
    if config.sliding_window is not None:
        raise ValueError(
            f"GPTModule: an 'attention_mask' of {tuple(mask.shape)} takes the place of the window of"
            f" GPTConfig(sliding_window={config.sliding_window}) in transformers, and not here. Give a mask [b, s]."
        )
    numbers = mask.is_floating_point() and bool(((mask != 0) & (mask > _NEVER)).any())
    if numbers or not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise ValueError(
            f"GPTModule: an 'attention_mask' {tuple(mask.shape)} of {mask.dtype} must be True where a query looks, or"
            " 0.0 there and -inf elsewhere; here it has other values."
        )
