"""Keeps documents apart that share a row of tokens, each of which ends with the same token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_megatron.models.row_documents import places


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

    def check_task(self, task: str) -> None:
        """Refuse options that would be without effect, or give several texts of a row one score.

        Raises:
            ValueError: The option and the task.
        """
        if task == "causal_lm":
            return
        for name in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
            if getattr(self, name) and (name == "eod_mask_loss" or task != "token_classification"):
                raise ValueError(
                    f"GPTModule({name}=True) is of rows that several documents share, and GPTConfig(task={task!r}) has"
                    f" {'labels of its own' if name == 'eod_mask_loss' else 'one label to a row, or one answer'}."
                    " Leave it out."
                )

    def positions(self, tokens: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
        """Position of each token ``[b, s]`` in its document; a document begins where ``others`` change, too."""
        numbers = self._starts(tokens).cumsum(dim=1)
        return places(numbers if others is None else numbers + others)

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
