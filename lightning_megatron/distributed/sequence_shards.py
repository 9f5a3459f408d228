"""Divides the tokens of each sequence over the ranks of a context-parallel group, and joins them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist

from lightning_megatron.distributed import process_groups


@dataclass(frozen=True)
class SequenceShards:
    """Which places of a row the ranks of a context-parallel group hold.

    Zig-zag, rank ``r`` of ``n`` holds the chunks ``r`` and ``2n - 1 - r`` of ``2n``, so that causal attention, in which
    later tokens look at more, costs every rank the same; megatron-core cuts rotary positions in this way. Otherwise a
    rank holds one chunk of ``n``.

    Args:
        size: Number of ranks that share a row.
        rank: This rank's number among them.
        zigzag: Whether the shards are balanced for causal attention.
    """

    size: int
    rank: int
    zigzag: bool = True

    @classmethod
    def here(cls, *, zigzag: bool) -> Self:
        """The shards of the context-parallel group that this rank is in."""
        group = process_groups.context_parallel()
        return cls(group.size(), group.rank(), zigzag)

    def parts(self, length: int, rank: int | None = None) -> list[range]:
        """The places of a row of ``length`` that ``rank`` (None: this one) holds, in the order of its shard.

        Raises:
            ValueError: ``length`` is no multiple of the number of chunks.
        """
        chunks = 2 * self.size if self.zigzag else self.size
        if length % chunks:
            raise ValueError(
                f"A sequence of {length} tokens does not divide into {chunks} chunks, which cp={self.size} needs. Pad"
                f" it to {-(-length // chunks) * chunks} (pad_inputs does)."
            )
        each, rank = length // chunks, self.rank if rank is None else rank
        numbers = (rank, chunks - 1 - rank) if self.zigzag else (rank,)
        return [range(number * each, (number + 1) * each) for number in numbers]

    def take(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's shard of ``tensor``, whose dimension ``dim`` runs along the row."""
        parts = [tensor.narrow(dim, part.start, len(part)) for part in self.parts(tensor.size(dim))]
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()

    def join(self, shards: list[torch.Tensor], dim: int) -> torch.Tensor:
        """The whole row from the shards of all ranks, in order of rank; the opposite of ``take``."""
        length = self.size * shards[0].size(dim)
        found: dict[int, torch.Tensor] = {}
        for rank, shard in enumerate(shards):
            parts = self.parts(length, rank)
            found |= {p.start: each for p, each in zip(parts, shard.split(len(parts[0]), dim), strict=True)}
        return torch.cat([found[start] for start in sorted(found)], dim)

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        """The shards ``[ranks, s/ranks, ...]`` of all ranks, of whole rows ``[s, ...]``."""
        length = rows.size(0)
        parts = (rows[part.start : part.stop] for rank in range(self.size) for part in self.parts(length, rank))
        return torch.cat(list(parts)).unflatten(0, (self.size, -1))

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The whole rows on every rank, from each rank's shard ``tensor``; without gradients."""
        if self.size == 1:
            return tensor
        shards = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(shards, tensor.detach().contiguous(), group=process_groups.context_parallel())
        return self.join(shards, dim)

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` of the rank that holds the rows' first tokens, on every rank; without gradients."""
        if self.size == 1:
            return tensor
        group, found = process_groups.context_parallel(), tensor.detach().contiguous()
        dist.broadcast(found, src=dist.get_global_rank(group, 0), group=group)
        return found
