"""Calls the chunks of all pipeline stages one after the other, as one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from lightning_megatron.distributed import process_groups


class Stages:
    """The chunks of one copy of the model; stage ``n`` is on pipeline rank ``n % pp``, as interleaved chunks are.

    Args:
        chunks: This rank's, in their order.
        dtype: Type of the hidden states.
        device: The device of the chunks.
    """

    def __init__(self, chunks: Sequence[Any], dtype: torch.dtype, device: torch.device) -> None:
        self.chunks = list(chunks)
        self.group = process_groups.pipeline()
        self.size = self.group.size()
        self.rank = self.group.rank()
        self.count = self.size * len(self.chunks)
        self.dtype = dtype
        self.device = device

    def relay(
        self, path: Sequence[int], shape: tuple[int, ...], run: Callable[[int, Any], torch.Tensor]
    ) -> torch.Tensor | None:
        """Run stages one behind the other, each on its rank, which is sent the one before's output.

        Args:
            path: The stages' numbers.
            shape: Shape of the hidden states that one stage sends to the next.
            run: Calls (number, chunk).

        Returns:
            The last one's output, on its rank; None on the others.
        """
        hidden: torch.Tensor | None = None
        for place, number in enumerate(path):
            if number % self.size != self.rank:
                continue
            chunk = self.chunks[number // self.size]
            if place and path[place - 1] % self.size != self.rank:
                hidden = torch.empty(shape, dtype=self.dtype, device=self.device)
                dist.recv(hidden, src=self._global_rank(path[place - 1]), group=self.group)
            if place:
                chunk.set_input_tensor(hidden)
            hidden = run(number, chunk)
            chunk.set_input_tensor(None)
            if place + 1 < len(path) and path[place + 1] % self.size != self.rank:
                dist.send(hidden.contiguous(), dst=self._global_rank(path[place + 1]), group=self.group)
        return hidden if path[-1] % self.size == self.rank else None

    def share(
        self, value: torch.Tensor | None, number: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Give every pipeline rank the ``value`` that stage ``number``'s has."""
        if value is None:
            value = torch.empty(shape, dtype=dtype, device=self.device)
        if self.size > 1:
            value = value.to(dtype).contiguous()
            dist.broadcast(value, src=self._global_rank(number), group=self.group)
        return value

    def _global_rank(self, number: int) -> int:
        return dist.get_global_rank(self.group, number % self.size)
