"""Keeps documents that share a row of tokens apart in positions, attention and loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lightning_megatron.models.host_answers import answers


@dataclass(frozen=True)
class Documents:
    """Megatron's options of documents in a row: what ends one, and what does not cross its end.

    Args:
        eod_id: The token that ends a document, and belongs to it.
        reset_position_ids: Positions start at 0 in each document.
        reset_attention_mask: A token looks only at tokens of its own document.
        eod_mask_loss: The token after the end of a document is left out of the loss.

    Raises:
        ValueError: An option without ``eod_id``.
    """

    eod_id: int | None = None
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False

    def __post_init__(self) -> None:
        asked = [name for name, value in vars(self).items() if name != "eod_id" and value]
        if asked and self.eod_id is None:
            raise ValueError(
                f"GPTModule({asked[0]}=True) needs eod_id, the token that ends a document (a TextDataModule's is"
                " datamodule.tokenizer.eod_id)."
            )

    def positions(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Position of each token ``[b, s]`` in its document; None where they do not start again."""
        if not self.reset_position_ids:
            return None
        index = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        starts = torch.where(self._starts(tokens), index, 0)
        return index - starts.cummax(dim=1).values

    def numbers(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """``[b, s]``, the number of each token's document in its row; None where that does not matter to attention."""
        return self._starts(tokens).cumsum(dim=1) if self.reset_attention_mask else None

    def kept(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The loss mask ``[b, s]``, without the predictions made at documents' ends."""
        return mask * (tokens != self.eod_id) if self.eod_mask_loss else mask

    def _starts(self, tokens: torch.Tensor) -> torch.Tensor:
        """True at the first token behind each end of a document."""
        ends = torch.eq(tokens[:, :-1], self.eod_id)  # type: ignore[arg-type]
        return torch.nn.functional.pad(ends, (1, 0))


def is_one_document(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``[b]``, whether the ``position_ids`` of each row go on by one; where they do not, a document begins."""
    return (batch["position_ids"].diff(dim=1) == 1).all(dim=1)


def numbers_by_positions(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """``[b, s]``, the number of each token's document in its row, which is what transformers reads there.

    Args:
        batch: A batch with ``position_ids`` ``[b, s]``; where one is not one more than the one before it, a document
            begins.

    Returns:
        None where each row is one document.
    """
    if all(answers(batch, is_one_document)):
        return None
    starts = torch.nn.functional.pad(batch["position_ids"].diff(dim=1) != 1, (1, 0))
    return starts.cumsum(dim=1)
