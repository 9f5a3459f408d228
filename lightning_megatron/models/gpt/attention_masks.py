"""Decides which earlier tokens a GPT's queries look at, by the masks and positions of a batch."""

from __future__ import annotations

import torch

from lightning_megatron.models import row_documents
from lightning_megatron.models.gpt.config import GPTConfig
from lightning_megatron.models.host_answers import answers
from lightning_megatron.models.layers.attention_pattern import AttentionPattern
from lightning_megatron.models.megatron_module import Batch

# Added to a score, this leaves nothing of it in any precision.
_NEVER = -1e4


def is_whole(batch: Batch) -> bool:
    """Whether the batch has transformers' mask of queries and keys, which says everything, looking ahead included."""
    mask = batch.get("attention_mask")
    return mask is not None and "input_ids" in batch and mask.dim() == 4


def sees_all(batch: Batch) -> torch.Tensor:
    """``[b]``, whether the ``attention_mask`` ``[b, s]`` of each row keeps all tokens."""
    return batch["attention_mask"].bool().all(dim=1)


def mask_or_pattern(
    batch: Batch, tokens: torch.Tensor, documents: torch.Tensor | None
) -> AttentionPattern | torch.Tensor | None:
    """Who looks at whom; None where nothing but what lies ahead is unseen, which attention has its fastest way for.

    A query that may look nowhere, of padding in front, gets zeros from attention, as in transformers.

    Args:
        batch: The batch of the loader; its ``attention_mask`` counts.
        tokens: ``[b, s]``.
        documents: ``[b, s]``, the number of each token's document in its row; None where each row is one.

    Returns:
        A pattern, or a mask ``[b, 1, s, s]``, True where a query may not look, where the batch has one of that shape.
    """
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 4:
        return _joined(_unseen(mask, "input_ids" in batch), documents, whole=is_whole(batch))
    keep = None if mask is None or all(answers(batch, sees_all)) else mask.bool()
    if keep is None and documents is None:
        return None
    return AttentionPattern(length=tokens.size(1), documents=documents, keep=keep)


def _unseen(mask: torch.Tensor, of_transformers: bool) -> torch.Tensor:
    """A batch's mask of queries and keys, True where a query may not look; transformers' is turned over."""
    if not of_transformers:
        return mask.bool()
    return mask != 0 if mask.is_floating_point() else ~mask


def _joined(unseen: torch.Tensor, documents: torch.Tensor | None, *, whole: bool) -> torch.Tensor:
    """``unseen`` with the documents apart, and, where it does not say all, with all that lies ahead."""
    if documents is not None:
        unseen = unseen | (documents[:, None, :, None] != documents[:, None, None, :])
    length = unseen.size(-1)
    return unseen if whole else unseen | torch.ones(length, length, dtype=torch.bool, device=unseen.device).triu(1)


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
    mask, said = batch.get("attention_mask"), row_documents.source(batch)
    says_documents = said is not None or (mask is None and "position_ids" in batch)
    if says_documents and not row_documents.is_one_document(batch).all():
        return f"{said or 'position_ids'!r} that begin documents"
    if mask is None:
        return ""
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
