"""The low-rank updates of one projection of a rank's experts, one for each expert, divided over ranks as it is."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name

from lightning_megatron.models.lora.config import LoRA


class ExpertAdapter(torch.nn.Module):
    """Updates of a projection whose experts' weights are in one tensor, ``[experts, out, in]``.

    ``A`` is ``[experts, rank, in]`` and ``B`` ``[experts, out, rank]``. Of the two, expert-tensor-parallel ranks divide
    the one that has the dimension that they divide of the weight. The other they hold whole, and each computes a part
    of its gradient: the sum over these ranks that the layer's output, or the gradient of its input, is taken to anyway
    makes the update whole, so that it sends nothing of its own.

    Args:
        linear: The projection, a ``GroupedLinear``.
        chosen: transformers' tensor that the projection's weight is, or megatron-core's where there is none.
        lora: Rank, scale and dropout of the updates.
    """

    def __init__(self, linear: Any, chosen: str, lora: LoRA) -> None:
        super().__init__()
        self.lora, self.chosen = lora, [chosen]
        self.__dict__["linear"] = linear  # not a part of this module
        weight = linear.weight
        experts, rows, columns = weight.shape
        down = torch.nn.Parameter(weight.new_empty(experts, lora.rank, columns))
        up = torch.nn.Parameter(weight.new_zeros(experts, rows, lora.rank))
        self.is_column = linear.divided == 1
        linear.mark(down, None if self.is_column else 2)
        linear.mark(up, 1 if self.is_column else None)
        self.part = chosen.removesuffix(".weight").rpartition(".")[2]
        self.add_module(self.part, torch.nn.ParameterDict({"A": down, "B": up}))

    def forward(self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
        """The update of the projection's output, ``[tokens, out]``; of a divided expert its part of the sum."""
        product, pair = self.__dict__["linear"].product, self._pair
        hidden = product(self._dropped(tokens), pair["A"], tokens_per_expert)
        output: torch.Tensor = product(hidden, pair["B"], tokens_per_expert)
        return output * self.lora.scale

    def shapes(self, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of ``A`` and ``B`` of all experts of the layer, whole."""
        (experts, rank, columns), rows = self._pair["A"].shape, self._pair["B"].size(1)
        experts *= self.__dict__["linear"].groups.ep.size()
        parts = self._parts[1]
        columns, rows = (columns, rows * parts) if self.is_column else (columns * parts, rows)
        return (experts, rank, columns), (experts, rows, rank)

    def fill(self, number: int, down: torch.Tensor, up: torch.Tensor) -> None:
        """Take this rank's part of the updates of all experts.

        Args:
            number: 0; a projection is one tensor of transformers'.
            down: ``A`` of each, ``[all experts, rank, in]``.
            up: ``B`` of each, ``[all experts, out, rank]``; rows of a gate, then of what it gates.
        """
        linear, count = self.__dict__["linear"], self._pair["A"].size(0)
        here = slice(linear.groups.ep.rank() * count, (linear.groups.ep.rank() + 1) * count)
        part, parts = self._parts
        if self.is_column:
            blocks = up[here].chunk(linear.blocks, 1)
            up, down = torch.cat([block.chunk(parts, 1)[part] for block in blocks], 1), down[here]
        else:
            up, down = up[here], down[here].chunk(parts, 2)[part]
        with torch.no_grad():
            self._pair["A"].copy_(down)
            self._pair["B"].copy_(up)

    def start(self, number: int, seed: int) -> None:
        """The first weights of the updates, the same whatever the layout: those of a linear layer, and zeros."""
        downs, ups = self.shapes(number)
        bound = 1 / math.sqrt(downs[-1])  # torch's `kaiming_uniform_(a=√5)`
        down = torch.empty(downs, device="cpu")
        down.uniform_(-bound, bound, generator=torch.Generator("cpu").manual_seed(seed))
        self.fill(number, down, torch.zeros(ups, device="cpu"))

    def sharded_state_dict(self, prefix: str = "", *_: Any) -> dict[str, Any]:
        """megatron-core's description of the tensors."""
        shard, start = self.__dict__["linear"].shard, f"{prefix}{self.part}."
        return {
            f"{start}A": shard(f"{start}A", self._pair["A"], None if self.is_column else 2),
            f"{start}B": shard(f"{start}B", self._pair["B"], 1 if self.is_column else None),
        }

    @property
    def _pair(self) -> Any:
        return self.get_submodule(self.part)

    @property
    def _parts(self) -> tuple[int, int]:
        """Which part of each expert this rank has, and of how many."""
        group = self.__dict__["linear"].groups.expt_tp
        return group.rank(), group.size()

    def _dropped(self, tokens: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.lora.dropout:
            return tokens
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            return torch.nn.functional.dropout(tokens, self.lora.dropout)
