"""Decides which tokens a T5's encoder, decoder and cross-attention look at, by the masks and documents of a batch.

A row may hold several texts: the n-th document of the encoder's row and the n-th of the decoder's are a pair. The keys
that say so are those of ``row_documents``, and the decoder's begin with ``decoder_``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightning_megatron.models import row_documents
from lightning_megatron.models.host_answers import Question, answers
from lightning_megatron.models.layers.attention_pattern import AttentionPattern, Mask
from lightning_megatron.models.megatron_module import IGNORED_LABEL, Batch

# Megatron's masks, 1 where a query may look: rows, queries, keys.
_MEGATRON = {"enc_mask": ("b", "se", "se"), "dec_mask": ("b", "sd", "sd"), "enc_dec_mask": ("b", "sd", "se")}
_DECODER = "decoder_"  # before keys of the decoder
_OF_SIDES = (*row_documents.KEYS, "position_ids", "attention_mask")

Documents = tuple[torch.Tensor, torch.Tensor]  # [b, se] and [b, sd], the number of each token's document in its row


def encoder_side(batch: Batch) -> Batch:
    """What the batch says of the encoder's tokens."""
    return {key: batch[key] for key in _OF_SIDES if key in batch}


def decoder_side(batch: Batch) -> Batch:
    """What the batch says of the decoder's tokens, under the names that the encoder's have."""
    return {key: batch[_DECODER + key] for key in _OF_SIDES if _DECODER + key in batch}


def encoder_is_one_document(batch: Batch) -> torch.Tensor:
    """``[b]``, whether each row of the encoder is one document."""
    return row_documents.is_one_document(encoder_side(batch))


def decoder_is_one_document(batch: Batch) -> torch.Tensor:
    """``[b]``, whether each row of the decoder is one document."""
    return row_documents.is_one_document(decoder_side(batch))


def documents_of(batch: Batch, shape: torch.Size, target_shape: torch.Size) -> Documents | None:
    """The documents of both sides; None where each row is one pair.

    Args:
        batch: The batch of the loader.
        shape: ``[b, se]``.
        target_shape: ``[b, sd]``.
    """
    found = [_numbers(batch, encoder_side(batch), encoder_is_one_document, shape)]
    found.append(_numbers(batch, decoder_side(batch), decoder_is_one_document, target_shape))
    if found == [None, None]:
        return None
    device = batch["input_ids"].device
    one_each = (torch.zeros(size, dtype=torch.long, device=device) for size in (shape, target_shape))
    encoder, decoder = (zeros if each is None else each for zeros, each in zip(one_each, found, strict=True))
    return encoder, decoder


def masks(batch: Batch, documents: Documents | None, targets: int) -> dict[str, Mask]:
    """Who looks at whom: masks, True where a query may not look, or patterns where there are documents.

    Args:
        batch: The batch of the loader.
        documents: Those of both sides, or None.
        targets: Tokens of a decoder's row.

    Returns:
        ``encoder_mask``, ``decoder_mask`` and ``cross_mask``, as ``T5Model`` takes them.
    """
    keep_targets = _keep(batch, keeps_all_targets)
    if documents is None:
        return {
            "encoder_mask": _mask(batch, "enc_mask"),
            "decoder_mask": _decoder_mask(batch, keep_targets, targets),
            "cross_mask": _mask(batch, "enc_dec_mask"),
        }
    (encoder, decoder), keep = documents, _keep(batch, keeps_all_tokens)
    length = encoder.size(1)
    return {
        "encoder_mask": AttentionPattern(length=length, documents=encoder, keep=keep, causal=False),
        "decoder_mask": AttentionPattern(length=targets, documents=decoder, keep=keep_targets),
        "cross_mask": AttentionPattern(
            length=length,
            documents=encoder,
            query_documents=decoder,
            keep=keep,
            queries=range(targets),
            causal=False,
        ),
    }


def questions(batch: Batch) -> Iterator[Question]:
    """What ``masks`` and ``documents_of`` ask about a batch."""
    for question, keep in _KEEP.items():
        if keep in batch:
            yield question
    if _says_documents(encoder_side(batch)):
        yield encoder_is_one_document
    if _says_documents(decoder_side(batch)):
        yield decoder_is_one_document


def check(batch: Batch, target: str) -> None:
    """Refuse masks of another shape, and documents that are none, or no pairs.

    Args:
        batch: The batch of the loader, on the host.
        target: Key of the decoder's tokens or labels.

    Raises:
        ValueError: A value is wrong; the message has it.
    """
    rows, length, targets = *batch["input_ids"].shape, batch[target].size(1)
    for key, shape in _MEGATRON.items():
        sizes = {"b": rows, "se": length, "sd": targets}
        wanted = tuple(sizes[letter] for letter in shape)
        if key in batch and tuple(batch[key].shape) != wanted:
            raise ValueError(
                f"T5Module: {key!r} is {tuple(batch[key].shape)}, and this batch's tokens ask for {wanted}"
                f" ([{', '.join(shape)}]). Correct the mask in the collate function."
            )
    for module, side, size in (
        ("T5Module", encoder_side(batch), length),
        ("T5Module, keys that begin with 'decoder_'", decoder_side(batch), targets),
    ):
        row_documents.check(module, side, rows, size)
        _check_positions(module, side, (rows, size))
    row_documents.check_padding("T5Module", encoder_side(batch))
    documents = documents_of(batch, batch["input_ids"].shape, batch[target].shape)
    if documents is not None:
        _check_pairs(batch, documents)


def _numbers(batch: Batch, side: Batch, is_one: Question, shape: torch.Size) -> torch.Tensor | None:
    if not _says_documents(side) or all(answers(batch, is_one)):
        return None
    return row_documents.of_tokens(side, shape[1]).expand(shape)


def _says_documents(side: Batch) -> bool:
    """Whether a side may have several documents; positions say so without a mask, as a GPT's do."""
    return row_documents.source(side) is not None or ("position_ids" in side and "attention_mask" not in side)


def _check_positions(module: str, side: Batch, shape: tuple[int, int]) -> None:
    positions = side.get("position_ids")
    if positions is None:
        return
    if tuple(positions.shape) not in (shape, (1, shape[1])) or positions.is_floating_point():
        raise ValueError(
            f"{module}: 'position_ids' are {tuple(positions.shape)} of {positions.dtype}, and the tokens {shape}; each"
            " token has one, a whole number. Correct the collate function."
        )
    if not _says_documents(side) and not row_documents.is_one_document(side).all():
        raise ValueError(
            f"{module}: 'position_ids' begin anew in a row, and beside an 'attention_mask' they do not say that"
            " documents begin. Add 'seq_idx' or 'cu_seqlens', or leave the mask out."
        )


def _check_pairs(batch: Batch, documents: Documents) -> None:
    """Refuse documents of one side without one of the other; what is padded at a row's end may be one more."""
    given = [key for key in _MEGATRON if key in batch]
    if given:
        raise ValueError(
            f"T5Module: {given[0]!r} says who looks at whom, and so do the documents of this batch. Leave one out."
        )
    keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) > 0.5
    labels = batch.get("labels")
    counted = torch.ones_like(documents[1], dtype=torch.bool) if labels is None else labels != IGNORED_LABEL
    for row, (encoder, decoder) in enumerate(zip(*documents, strict=True)):
        sources, all_targets = set(encoder[keep[row]].tolist()), set(decoder.tolist())
        targets = set(decoder[counted[row]].tolist())
        if not targets <= sources <= all_targets:
            raise ValueError(
                f"T5Module: row {row} has {len(sources)} documents of the encoder and {len(all_targets)} of the"
                " decoder; the first is a pair with the first, and so on. Give both sides' borders ('cu_seqlens' and"
                " 'decoder_cu_seqlens', or 'seq_idx' and 'decoder_seq_idx'); padding behind the last document is"
                " masked by 'attention_mask', and has labels of -100."
            )
    if "seq_idx" in batch and "decoder_seq_idx" in batch:
        _check_order(batch["seq_idx"], batch["decoder_seq_idx"])


def _check_order(encoder: torch.Tensor, decoder: torch.Tensor) -> None:
    """Refuse numbers that name other documents on one side, or in another order."""
    for row in range(len(encoder)):
        orders = [side[row].unique_consecutive().tolist() for side in (encoder, decoder)]
        for place, (source, target) in enumerate(zip(*orders, strict=False)):
            if source != target:
                raise ValueError(
                    f"T5Module: document {place} of row {row} is number {source} of 'seq_idx' and {target} of"
                    " 'decoder_seq_idx'. Put the documents of both sides in one order."
                )


def _mask(batch: Batch, key: str) -> torch.Tensor | None:
    """Megatron's mask where the batch has one, else one made from the encoder's kept tokens; None where all are."""
    if key in batch:
        return ~_looks_somewhere(batch[key] > 0.5)[:, None]
    keep = _keep(batch, keeps_all_tokens)
    return None if keep is None else ~keep[:, None, None, :]


def _decoder_mask(batch: Batch, keep: torch.Tensor | None, length: int) -> Mask:
    if "dec_mask" not in batch:
        return None if keep is None else AttentionPattern(length=length, keep=keep)
    mask = ~(batch["dec_mask"] > 0.5)[:, None]
    ahead = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    itself = torch.eye(length, dtype=torch.bool, device=mask.device)
    mask = ahead | mask
    return mask & ~(mask.all(dim=-1, keepdim=True) & itself)  # a softmax needs one key


def _keep(batch: Batch, keeps_all: Question) -> torch.Tensor | None:
    """``[b, s]``, the tokens that are looked at; None where all are."""
    keep: Any = batch.get(_KEEP[keeps_all])
    return None if keep is None or all(answers(batch, keeps_all)) else _looks_somewhere(keep > 0.5)


def keeps_all_tokens(batch: Batch) -> torch.Tensor:
    """``[b]``, whether all of the encoder's tokens in each row are looked at."""
    return _looks_somewhere(batch["attention_mask"] > 0.5).all(dim=1)


def keeps_all_targets(batch: Batch) -> torch.Tensor:
    """``[b]``, whether all of the decoder's tokens in each row are looked at."""
    return _looks_somewhere(batch["decoder_attention_mask"] > 0.5).all(dim=1)


# Each question is about the mask [b, s] of this name.
_KEEP: dict[Question, str] = {keeps_all_tokens: "attention_mask", keeps_all_targets: "decoder_attention_mask"}


def _looks_somewhere(keep: torch.Tensor) -> torch.Tensor:
    """A query that may look at nothing looks at everything: its output is not used, and a softmax needs one key."""
    return keep | ~keep.any(dim=-1, keepdim=True)
