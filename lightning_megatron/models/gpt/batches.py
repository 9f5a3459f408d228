"""Reads a GPT's batches of either form, transformers' or Megatron's, and checks their ids, lengths and positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lightning_megatron.models import row_documents
from lightning_megatron.models.batch_checks import check_range
from lightning_megatron.models.gpt.config import GPTConfig
from lightning_megatron.models.megatron_module import IGNORED_LABEL, Batch


def token_key(batch: Batch) -> str:
    """The key of the batch's tokens, which says of which form it is."""
    for name in ("input_ids", "tokens", "text"):
        if name in batch:
            return name
    raise ValueError(
        f"GPTModule needs 'input_ids' [b, s], or Megatron's 'tokens' and 'labels' [b, s] or 'text' [b, s+1]; this batch"
        f" has {sorted(batch)}. Rename the key in the collate function, or override get_batch."
    )


def says_documents(batch: Batch) -> bool:
    """Whether the batch may say where documents begin; positions do without a mask, as in transformers."""
    return row_documents.source(batch) is not None or ("position_ids" in batch and "attention_mask" not in batch)


def tokens_of(batch: Batch) -> torch.Tensor:
    """The tokens ``[b, s]``."""
    name = token_key(batch)
    return batch[name].long() if name != "text" else batch[name][:, :-1].long().contiguous()


def labelled(batch: Batch) -> Batch:
    """The labels of the tokens, which are those that follow, and the loss mask ``[b, s]``."""
    return _from_transformers(batch) if token_key(batch) == "input_ids" else _from_megatron(batch)


def _from_megatron(batch: Batch) -> Batch:
    labels = (batch["text"][:, 1:] if "text" in batch else batch["labels"]).long().contiguous()
    mask = (labels != IGNORED_LABEL).float()
    if "loss_mask" in batch:
        mask = mask * batch["loss_mask"].float()
    return {"labels": labels.clamp(min=0), "loss_mask": mask}


def _from_transformers(batch: Batch) -> Batch:
    tokens = batch["input_ids"].long()
    attention = batch.get("attention_mask")
    labels = batch.get("labels")
    if labels is None:
        labels = tokens
        if attention is not None and attention.dim() == 2:
            labels = tokens.masked_fill(attention == 0, IGNORED_LABEL)
    shifted = batch.get("shift_labels")
    if shifted is None:
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    mask = (shifted != IGNORED_LABEL).float()
    if "loss_mask" in batch:  # aligned with the labels, so it shifts with them
        mask = mask * F.pad(batch["loss_mask"][:, 1:].float(), (0, 1))
    return {"labels": shifted.clamp(min=0).long(), "loss_mask": mask}


def check_length(config: GPTConfig, length: int) -> None:
    """Refuse rows that are longer than the positions of the model."""
    if length > config.seq_length:
        raise ValueError(
            f"GPTModule: sequences of {length} tokens, but GPTConfig(seq_length={config.seq_length})."
            f" Cut the samples, or use seq_length={length} or more."
        )


def check_form(config: GPTConfig, batch: Batch) -> None:
    """Refuse batches of Megatron's form where a head has labels, which are none of the tokens that follow."""
    if config.task != "causal_lm" and "input_ids" not in batch:
        raise ValueError(
            f"GPTModule with task={config.task!r} needs 'input_ids' [b, s]; this batch has {sorted(batch)}. Rename the"
            " key in the collate function."
        )


def check_labels(config: GPTConfig, batch: Batch) -> None:
    """Refuse labels beyond the vocabulary."""
    for labels in ("labels", "shift_labels"):
        if labels in batch:
            check_ids(config, labels, batch[labels][batch[labels] != IGNORED_LABEL])


def check_ids(config: GPTConfig, name: str, ids: torch.Tensor) -> None:
    """Refuse ids beyond the vocabulary, in what the batch has by that name."""
    vocab_size = config.vocab_size
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.numel():
        raise ValueError(
            f"GPTModule: token id {int(wrong.max())} in {name!r} is outside of the vocabulary of"
            f" GPTConfig(vocab_size={vocab_size}), ids 0 to {vocab_size - 1}. Use the tokenizer's own vocab_size."
            f" Labels may also be {IGNORED_LABEL}, which leaves a token out of the loss."
        )


def check_positions(config: GPTConfig, batch: Batch, shape: tuple[int, int]) -> None:
    """Refuse positions that are not one for each token, or that the model has no embedding of."""
    positions = batch["position_ids"]
    if tuple(positions.shape) not in (shape, (1, shape[1])) or positions.is_floating_point():
        raise ValueError(
            f"GPTModule: 'position_ids' are {tuple(positions.shape)} of {positions.dtype}, and the tokens {shape};"
            " each token has one, a whole number. Correct the collate function."
        )
    if config.position_embedding != "learned":
        positions = positions.clamp(min=0)  # of padding in front, they may be negative
    check_range("GPTModule", "position_ids", positions, config.seq_length, "GPTConfig.seq_length")
