"""The cached keys and values of the tokens so far, and the texts that they belong to."""

from __future__ import annotations

from collections.abc import Callable

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
        self._rotations: dict[int, tuple[int, Rotation]] = {}  # of a table of angles, from a place on
        self._spare: dict[int, tuple[torch.Tensor, ...]] = {}  # of a layer: what its memories are moved to
        self._of_all_tokens: dict[int, torch.Tensor] = {}  # of a layer

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

    def add(self, layer: int, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keep a layer's keys and values ``[new, rows, groups, head]``; all of them so far are returned.

        Multi-latent attention keeps one tensor in their place, of one group.
        """
        if layer not in self.key_value_memory_dict:
            self.key_value_memory_dict[layer] = tuple(
                each.new_empty(self.max_sequence_length, *each.shape[1:]) for each in new
            )
        memories = self.key_value_memory_dict[layer]
        first, end = self.sequence_len_offset, self.sequence_len_offset + new[0].size(0)
        for memory, each in zip(memories, new, strict=True):
            memory[first:end] = each
        return tuple(memory[:end] for memory in memories)

    def once(self, layer: int, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What a layer computes once for all tokens, by ``make``."""
        if layer not in self._of_all_tokens:
            self._of_all_tokens[layer] = make()
        return self._of_all_tokens[layer]

    def rotation(self, angles: torch.Tensor, new: torch.Tensor, interleaved: bool, table: int = 0) -> Rotation:
        """The rotation of the new tokens, whose cosines and sines are computed once for all layers of a table.

        Args:
            angles: ``[s, 1, 1, channels]``, of all places.
            new: Keys ``[new, rows, groups, head]`` of the new tokens.
            interleaved: Whether the two channels of a pair lie side by side, as in ``Rotation``.
            table: Number of the table of angles, where layers with a window have one of their own.
        """
        first = self.sequence_len_offset
        if self._rotations.get(table, (None,))[0] != first:
            self._rotations[table] = first, Rotation(angles[first : first + new.size(0)], new.dtype, interleaved)
        return self._rotations[table][1]

    def advance(self, tokens: int) -> None:
        """Count tokens whose keys and values are in the cache."""
        self.increment_sequence_len_offset(tokens)


class Rotation:
    """Rotates queries and keys as megatron-core's ``apply_rotary_pos_emb`` does, to the bit.

    Args:
        angles: ``[new, 1, 1, channels]``.
        dtype: Type of queries and keys.
        interleaved: Whether the two channels of a pair lie side by side, instead of half of the channels apart.
    """

    def __init__(self, angles: torch.Tensor, dtype: torch.dtype, interleaved: bool) -> None:
        self.channels = angles.size(-1)
        self.interleaved = interleaved
        self.cosine, self.sine = angles.cos().to(dtype), angles.sin().to(dtype)
        # A pair (x, y) becomes (x cos - y sin, y cos + x sin).
        self.sine[..., slice(None, None, 2) if interleaved else slice(self.channels // 2)].neg_()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate ``[new, rows, heads, head]``, whose last channels may be left as they are."""
        part = x if self.channels == x.size(-1) else x[..., : self.channels]
        if self.interleaved:
            partners = part.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            partners = part.roll(self.channels // 2, -1)
        rotated = (part * self.cosine).add_(partners.mul_(self.sine))
        return rotated if part is x else torch.cat((rotated, x[..., self.channels :]), dim=-1)
