"""Pads prompts on the left, and makes them equal on all ranks that hold a part of the model."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

import torch

from lightning_megatron.distributed import collectives, process_groups


@dataclass(frozen=True)
class Prompts:
    """Prompts of one replica.

    Args:
        ids: ``[b, s]``, padded on the left.
        keep: ``[b, s]``, False where there is padding.
    """

    ids: torch.Tensor
    keep: torch.Tensor

    @classmethod
    def of(cls, input_ids: Any, attention_mask: Any, vocab_size: int) -> Prompts:
        """Check prompts, and move their padding, wherever it is, to the left.

        Args:
            input_ids: ``[b, s]``, a tensor or what becomes one.
            attention_mask: ``[b, s]``, 0 where a prompt is padded; None: no prompt is padded.
            vocab_size: Number of token ids of the model.

        Raises:
            ValueError: They are not ``[b, s]`` whole numbers of the vocabulary with a mask alike, or one is empty.
        """
        input_ids = _tensor("input_ids", input_ids)
        attention_mask = None if attention_mask is None else _tensor("attention_mask", attention_mask)
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"generate: input_ids are {input_ids.dtype} of shape {tuple(input_ids.shape)}; use token ids [b, s]."
            )
        keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if keep.shape != input_ids.shape:
            raise ValueError(
                f"generate: attention_mask has shape {tuple(keep.shape)}, and input_ids {tuple(input_ids.shape)}. Use"
                " one of 1 and 0 for each token."
            )
        empty = (~keep.any(dim=1)).nonzero().flatten().tolist()
        if not len(input_ids) or empty or not input_ids.size(1):
            raise ValueError(
                f"generate: {f'prompt {empty[0]} of {len(input_ids)}' if empty else 'the batch'} is empty. Begin each"
                " with a token, such as the tokenizer's beginning of text."
            )
        seen = input_ids[keep]
        if int(seen.min()) < 0 or int(seen.max()) >= vocab_size:
            wrong = int(seen.max() if int(seen.max()) >= vocab_size else seen.min())
            raise ValueError(
                f"generate: token id {wrong} in the prompts is outside of the vocabulary, ids 0 to {vocab_size - 1}."
                " Use the model's own tokenizer."
            )
        order = keep.int().argsort(dim=1, stable=True)  # padding first, tokens in their order
        ids = input_ids.long().where(keep | ((input_ids >= 0) & (input_ids < vocab_size)), 0)
        return cls(ids.gather(1, order), keep.gather(1, order))

    @classmethod
    def same(cls, token: int, rows: int) -> Prompts:
        """``rows`` prompts of one token."""
        ids = torch.full((rows, 1), token, device="cpu")
        return cls(ids, torch.ones_like(ids, dtype=torch.bool))

    def to(self, device: torch.device) -> Prompts:
        """Move the prompts to the device."""
        return Prompts(self.ids.to(device), self.keep.to(device))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(self.keep.sum(dim=1).max())

    def fingerprint(self) -> str:
        """A hash of ids and padding, which ranks compare."""
        both = torch.stack([self.ids, self.keep.long()]).cpu()
        return hashlib.sha256(both.numpy().tobytes() + repr(tuple(both.shape)).encode()).hexdigest()


def _tensor(name: str, value: Any) -> torch.Tensor:
    try:
        return value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")
    except (ValueError, TypeError, RuntimeError):
        raise ValueError(
            f"generate({name}={str(value)[:60]!r}) makes no tensor [b, s]: use token ids, prompts of different lengths"
            " padded, as tokenizer(texts, padding=True, return_tensors='pt') gives them."
        ) from None


def agree(error: Exception | None, fingerprint: str, everywhere: bool = False) -> int:
    """Have all ranks that hold a part of this copy of the model go on, or stop, together.

    Args:
        error: Why this rank cannot go on.
        fingerprint: A hash of the prompts and settings that this rank was given.
        everywhere: Whether all replicas go on or stop together, each with prompts of its own.

    Returns:
        A seed, the same on all of them, for a call that names none.

    Raises:
        ValueError: A rank cannot go on, or ranks were given different things.
    """
    own = process_groups.replicas().rank()
    told = (own, None if error is None else str(error), fingerprint, secrets.randbits(31))
    everyone = collectives.gather(told, process_groups.gloo_world() if everywhere else process_groups.model_parallel())
    if error is not None:
        raise error
    kind, first = "Rank" if everywhere else "Model-parallel rank", dict[int, tuple[int, str, int]]()
    for rank, (replica, text, other, seed) in enumerate(everyone):
        if text is not None:
            raise ValueError(f"{kind} {rank} refuses its prompts: {text}")
        leader, wanted, _ = first.setdefault(replica, (rank, other, seed))
        if other != wanted:
            raise ValueError(
                f"generate: the prompts or settings of {kind.lower()} {rank} differ from those of rank {leader}, and"
                " they hold parts of one model. Give the same to all ranks of a replica (as the strategy's sampler"
                " does)."
            )
    return first[own][2]
