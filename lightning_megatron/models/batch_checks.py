"""Checks of a batch that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def given(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without what a collate function left at None, which is not given."""
    return {name: value for name, value in batch.items() if value is not None}


# What transformers' models take in a batch and these do not: it would change what is computed. Flags of their output
# (``return_dict``, ``use_cache``, ...) and columns that they ignore are ignored here, too.
UNMET = {
    "inputs_embeds": "give 'input_ids'",
    "decoder_inputs_embeds": "give 'decoder_input_ids' or 'labels'",
    "encoder_outputs": "give 'input_ids'",
    "past_key_values": "a batch is computed without a cache",
    "cache": "a batch is computed without a cache",
    "cache_position": "give 'position_ids'",
    "encoder_hidden_states": "no model here attends to states that another model computed",
    "encoder_attention_mask": "no model here attends to states that another model computed",
    "head_mask": "no head is masked here",
    "decoder_head_mask": "no head is masked here",
    "cross_attn_head_mask": "no head is masked here",
    "logits_to_keep": "logits are given of all tokens; take those that you need from them",
    "num_items_in_batch": "the loss is the mean over the tokens of the whole global batch, which are counted here",
}


def refuse(module: str, batch: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Refuse keys that would be without effect here, and have one in transformers.

    Args:
        module: Name of the module class, for the error.
        batch: The batch of the loader.
        reasons: The advice for each refused key.

    Raises:
        ValueError: There is one; the message names the first.
    """
    for name, instead in reasons.items():
        if batch.get(name) is not None:
            raise ValueError(
                f"{module}: {name!r} in the batch has no counterpart here: {instead}. Leave it out in the collate"
                " function, or override get_batch."
            )


def check_tokens(module: str, name: str, ids: torch.Tensor) -> None:
    """Refuse what is no table of token ids.

    Args:
        module: Name of the module class, for the error.
        name: Key of the batch.
        ids: The value of that key.

    Raises:
        ValueError: The value is no tensor of integers ``[b, s]``, or has no token.
    """
    seen = f"{list(ids.shape)} of {ids.dtype}" if isinstance(ids, torch.Tensor) else f"a {type(ids).__name__}"
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise ValueError(
            f"{module}: {name!r} is {seen}. It takes integers [b, s], one for each token, of a token or more; pad"
            " and stack the samples in the collate function."
        )


def check_alike(module: str, batch: Mapping[str, torch.Tensor], name: str, other: str) -> None:
    """Refuse one key whose shape is not another's.

    Raises:
        ValueError: The shapes differ; the message has both.
    """
    if name in batch and batch[name].shape != batch[other].shape:
        raise ValueError(
            f"{module}: {name!r} is {tuple(batch[name].shape)} and {other!r} {tuple(batch[other].shape)}; each token"
            " has one."
        )


def check_range(module: str, name: str, ids: torch.Tensor, size: int, setting: str) -> None:
    """Refuse numbers of a batch that a table of the model has no row for.

    Args:
        module: Name of the module class, for the error.
        name: Key of the batch.
        ids: The value of that key, without labels that are ignored.
        size: Number of rows of the table.
        setting: Name of the setting that says the size.

    Raises:
        ValueError: There is one; the message names the first.
    """
    wrong = ids[(ids < 0) | (ids >= size)]
    if wrong.numel():
        raise ValueError(
            f"{module}: {int(wrong[0])} in {name!r} is outside of 0 to {size - 1}, as {setting}={size} has it. Correct"
            " the data or the number; a vocabulary's is the tokenizer's own."
        )
