"""The cached keys and values of the tokens so far, and the texts that they belong to."""

from __future__ import annotations

import torch
from megatron.core.inference.contexts import StaticInferenceContext


class KeyValueCache(StaticInferenceContext):
    """megatron-core's cache of keys and values, which knows its texts and follows beams that take one another's place.

    Args:
        rows: Number of texts: ``beams`` of each prompt, in consecutive rows.
        beams: Texts of each prompt.
        max_length: Tokens of the longest text there will be.
    """

    def __init__(self, rows: int, beams: int, max_length: int) -> None:
        super().__init__(max_batch_size=rows, max_sequence_length=max_length)
        self.prompt_of_row = torch.arange(rows, device="cpu") // beams
        self.texts: torch.Tensor | None = None
        self._spare: dict[int, tuple[torch.Tensor, ...]] = {}  # of a layer: what its memories are moved to

    def take(self, texts: torch.Tensor) -> torch.Tensor:
        """What of the texts is new ``[rows, new]``; rows are brought into the order of the texts they begin.

        Args:
            texts: ``[rows, s]``, each a text of the last call, of the same prompt, and further tokens.
        """
        before, self.texts = self.texts, texts
        if before is None:
            return texts
        known = texts[:, : before.size(1)]
        if not torch.equal(known, before):
            same = (known[:, None] == before).all(dim=-1)  # [rows, rows]
            place = self.prompt_of_row.to(same.device)
            same &= place[:, None] == place
            self._bring(same.int().argmax(dim=1))  # equal texts have equal keys: any will do
        self.enable_decode_mode()
        return texts[:, before.size(1) :]

    def _bring(self, rows: torch.Tensor) -> None:
        """Give each row the keys and values of another.

        As megatron-core's ``swap_key_value_dict``, which copies what is not filled yet, too.
        """
        for layer, memories in self.key_value_memory_dict.items():  # none on a rank of a T5's encoder
            spare = self._spare.setdefault(layer, tuple(torch.empty_like(memory) for memory in memories))
            for memory, other in zip(memories, spare, strict=True):  # [s, rows, groups, head]
                filled = slice(0, self.sequence_len_offset)
                torch.index_select(memory[filled], 1, rows, out=other[filled])
            self.key_value_memory_dict[layer], self._spare[layer] = spare, memories

    def advance(self, tokens: int) -> None:
        """Count tokens whose keys and values are in the cache."""
        self.increment_sequence_len_offset(tokens)
