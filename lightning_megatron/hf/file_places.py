"""``Place``: which part of a tensor of transformers' model a tensor of a file is."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lightning_megatron.hf.weight_mapping import Shape


class Place(NamedTuple):
    """Which part of a model's tensor a tensor of a file is.

    Args:
        name: The model's tensor.
        expert: Number of the expert whose matrix it is; None: it is all of the model's tensor.
        part: Which of the parts it is that are one above the other in that matrix, such as the gate.
        parts: How many of them there are.
    """

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of the model's tensor ``[experts, rows, columns]``."""
        return whole if self.expert is None else whole[self.expert].chunk(self.parts)[self.part]

    def shape(self, whole: Shape) -> Shape:
        """The shape of this part, given that of the model's tensor."""
        return whole if self.expert is None else (whole[1] // self.parts, *whole[2:])
