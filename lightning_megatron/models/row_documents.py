"""Reads which documents share the rows of a batch: by ``cu_seqlens``, ``seq_idx`` or ``position_ids``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from lightning_megatron.models.host_answers import answers

# Where the documents of a row begin and end, [b, n], or [n] of one row. The first that a batch has counts: where each
# document is padded, Megatron's ``cu_seqlens_padded`` are the places in the row, and ``cu_seqlens`` lengths alone.
_BORDERS = ("cu_seqlens_padded", "cu_seqlens_q_padded", "cu_seqlens", "cu_seqlens_q", "cu_seq_lens_q")
# Of keys, which in self-attention are the queries'.
_OF_KEYS = {
    "cu_seqlens_kv_padded": "cu_seqlens_q_padded",
    "cu_seqlens_kv": "cu_seqlens_q",
    "cu_seq_lens_k": "cu_seq_lens_q",
}
_NUMBERS = "seq_idx"  # transformers' and Mamba's: the number of each token's document, [b, s]
KEYS = (*_BORDERS, *_OF_KEYS, _NUMBERS)  # of a batch

Batch = Mapping[str, torch.Tensor]


def source(batch: Batch) -> str | None:
    """The key of the batch that says which documents share its rows; None where there is none but positions."""
    return next((name for name in (*_BORDERS, _NUMBERS) if batch.get(name) is not None), None)


def without_token_mask(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without the mask ``[b]`` that NeMo puts beside ``cu_seqlens``, which says nothing of any token."""
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 1 or source(batch) is None:
        return batch
    return {name: value for name, value in batch.items() if name != "attention_mask"}


def is_one_document(batch: Batch) -> torch.Tensor:
    """``[b]``, whether each row is one document."""
    name = source(batch)
    if name is None:
        return (batch["position_ids"].diff(dim=1) == 1).all(dim=1)
    if name == _NUMBERS:
        return (batch[name].diff(dim=1) == 0).all(dim=1)
    return (_rows(batch[name]).diff(dim=1) > 0).sum(dim=1) <= 1  # what follows the last border falls, or stays


def numbers(batch: Batch, length: int) -> torch.Tensor | None:
    """``[b or 1, s]``, the number of each token's document in its row; None where each row is one document.

    Args:
        batch: A batch with a key of ``source``, or with ``position_ids``: where one is not one more than the one before
            it, a document begins, as transformers reads them.
        length: Tokens of a row.
    """
    return None if all(answers(batch, is_one_document)) else of_tokens(batch, length)


def places(documents: torch.Tensor) -> torch.Tensor:
    """The place of each token in its document, ``[b, s]``."""
    index = torch.arange(documents.size(1), device=documents.device).expand_as(documents)
    begins = F.pad(documents.diff(dim=1) != 0, (1, 0))
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def longest(batch: Batch, length: int) -> int:
    """Tokens of the longest document of a batch on the host, which has rows of ``length`` tokens."""
    found = None if source(batch) is None else numbers(batch, length)
    return length if found is None else int(places(found).max()) + 1


def within_documents(mask: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """A loss mask ``[b, s]`` without the predictions of a document's last token, which are of the next document."""
    return mask * F.pad(documents.diff(dim=1) == 0, (0, 1), value=True)


def of_tokens(batch: Batch, length: int) -> torch.Tensor:
    """As ``numbers``, where each row is one document, too."""
    name = source(batch)
    if name is None:
        return F.pad(batch["position_ids"].diff(dim=1) != 1, (1, 0)).cumsum(dim=1)
    if name == _NUMBERS:  # they may fall: a loader's padding is often 0
        return F.pad(batch[name].diff(dim=1) != 0, (1, 0)).cumsum(dim=1)
    borders = _rows(batch[name]).long()
    index = torch.arange(length, device=borders.device).expand(len(borders), length).contiguous()
    return torch.searchsorted(borders[:, 1:].masked_fill(borders[:, 1:] < 0, length).contiguous(), index, right=True)


def _rows(borders: torch.Tensor) -> torch.Tensor:
    return borders if borders.dim() == 2 else borders[None]


def check(module: str, batch: Batch, rows: int, length: int) -> None:
    """Refuse borders of documents that are none, or that contradict one another.

    Args:
        module: Name of the module class, for the error.
        batch: The batch of the loader, on the host.
        rows: Number of rows.
        length: Tokens of a row.

    Raises:
        ValueError: A value is wrong; the message has it.
    """
    for name in (*_BORDERS, *_OF_KEYS):
        if batch.get(name) is not None:
            _check_form(module, name, batch[name], rows)
    for keys, queries in _OF_KEYS.items():
        if keys in batch and (queries not in batch or not torch.equal(batch[keys], batch[queries])):
            raise ValueError(
                f"{module}: {keys!r} is not {queries!r}; in self-attention the keys are the queries' own documents."
                f" Give both alike, or leave {keys!r} out."
            )
    said = source(batch)
    if said is None:
        return
    if said == _NUMBERS:
        _check_shape(module, batch[_NUMBERS], rows, length)
    else:
        _check_ends(module, said, batch[said], length)
    found = of_tokens(batch, length).expand(rows, length)
    if said != _NUMBERS and _NUMBERS in batch:
        _check_shape(module, batch[_NUMBERS], rows, length)
        _compare(module, found, said, of_tokens({_NUMBERS: batch[_NUMBERS]}, length), _NUMBERS)
    if "position_ids" in batch:
        _check_positions(module, found, said, batch["position_ids"].expand(rows, -1))


def check_encoder(module: str, batch: Batch) -> None:
    """Refuse what a causal model may leave to the direction in which it looks: padding, and positions alone.

    Raises:
        ValueError: Documents have padding that is not masked, or only positions say that there are several.
    """
    check_padding(module, batch)
    positions, masked = batch.get("position_ids"), batch.get("attention_mask") is not None
    if positions is not None and not masked and source(batch) is None and not is_one_document(batch).all():
        raise ValueError(
            f"{module}: 'position_ids' begin anew in a row, and do not say whether the texts look at one another (in"
            " transformers they do). Add 'seq_idx' or 'cu_seq_lens_q' to keep texts apart"
            " (DataCollatorWithFlattening(return_seq_idx=True)), or an 'attention_mask' of ones if the row is one text."
        )


def check_padding(module: str, batch: Batch) -> None:
    """Refuse documents of an encoder that are padded without a mask.

    Raises:
        ValueError: They are.
    """
    padded = [name for name in ("cu_seqlens_padded", "cu_seqlens_q_padded", "cu_seqlens_unpadded") if name in batch]
    if padded and batch.get("attention_mask") is None:
        raise ValueError(
            f"{module}: {padded[0]!r} says that documents are padded, and tokens that look in both directions would"
            " look at their padding. Add an 'attention_mask' [b, s], 0 at the padding."
        )


def _check_form(module: str, name: str, borders: Any, rows: int) -> None:
    if not isinstance(borders, torch.Tensor) or borders.is_floating_point() or borders.dim() not in (1, 2):
        seen = f"{tuple(borders.shape)} of {borders.dtype}" if isinstance(borders, torch.Tensor) else repr(borders)[:60]
        raise ValueError(f"{module}: {name!r} is {seen}; it takes whole numbers [n], or [b, n] of several rows.")
    if len(_rows(borders)) != rows:
        raise ValueError(
            f"{module}: {name!r} is {tuple(borders.shape)}, and the batch has {rows} rows. Each row has borders of its"
            " own, from 0 to its length: give [b, n], with -1 behind those of rows with fewer; or one row of all"
            " tokens."
        )


def _check_ends(module: str, name: str, borders: torch.Tensor, length: int) -> None:
    """Refuse borders that do not rise from 0 to the row's length; -1, and the last one again, may follow."""
    for number, row in enumerate(_rows(borders).tolist()):
        said = row[: row.index(-1)] if -1 in row else row
        rises = all(first <= last for first, last in zip(said, said[1:], strict=False))
        if not said or said[0] != 0 or said[-1] != length or not rises or any(x != -1 for x in row[len(said) :]):
            shown = f"{row[:12]}"[:-1] + (", ...]" if len(row) > 12 else "]")
            raise ValueError(
                f"{module}: {name!r} of row {number} is {shown}, and the row has {length} tokens. It rises from 0 to"
                f" {length}, and behind that has {length} or -1 only; padding at the row's end is a document of its"
                " own, or a part of the last one."
            )


def _check_shape(module: str, numbers: torch.Tensor, rows: int, length: int) -> None:
    if tuple(numbers.shape) not in ((rows, length), (1, length)) or numbers.is_floating_point():
        raise ValueError(
            f"{module}: {_NUMBERS!r} is {tuple(numbers.shape)} of {numbers.dtype}, and the tokens {(rows, length)};"
            " each token has the number of its document. Correct the collate function."
        )


def _check_positions(module: str, found: torch.Tensor, said: str, positions: torch.Tensor) -> None:
    """Positions begin anew with each document, and nowhere else but in padding, whose positions are 0."""
    begins, goes_on = found.diff(dim=1) != 0, positions.diff(dim=1) == 1
    zero = positions[:, 1:] == 0
    next_is_new = F.pad(begins[:, 1:] | zero[:, 1:], (0, 1), value=True)
    wrong = (begins & goes_on) | (~begins & ~goes_on & ~(zero & next_is_new))
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        does = "begins a document" if begins[row, place] else "has no border"
        before, here = positions[row, place : place + 2].tolist()
        raise ValueError(
            f"{module}: {said!r} and 'position_ids' contradict each other: at token {place + 1} of row {row} {said!r}"
            f" {does}, and 'position_ids' have {here} behind {before}. Correct one, or leave 'position_ids' out, which"
            " then begin at 0 in each document."
        )


def _compare(module: str, found: torch.Tensor, said: str, others: torch.Tensor, other: str) -> None:
    differ = (found.diff(dim=1) != 0) != (others.diff(dim=1) != 0)
    if differ.any():
        row, place = differ.nonzero()[0].tolist()
        raise ValueError(
            f"{module}: {said!r} and {other!r} contradict each other: at token {place + 1} of row {row} only one of"
            " them begins a document. Correct the collate function, or leave one out."
        )
