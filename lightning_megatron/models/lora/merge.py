"""Gathers a model's low-rank updates under transformers' names, to write them or to add them to the weights."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from lightning_megatron.hf.weight_mapping import Heads, Same, TensorMapping, WeightMapping
from lightning_megatron.models.lora.config import LoRA
from lightning_megatron.models.lora.inject import key_prefix_of, targets_of

# By transformers' name of the weight: A and B.
Each = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Updates:
    """The updates of a whole model, by transformers' names of the weights.

    Args:
        lora: Rank and scale of the updates.
        mapping: transformers' tensors that each of the model's tensors is made of.
        config: Configuration of the model.
    """

    def __init__(self, lora: LoRA, mapping: WeightMapping, config: Any) -> None:
        self.lora = lora
        self._heads = Heads.of(config)
        self._places: dict[str, tuple[TensorMapping, str]] = {}  # by the beginning of a key: of which weight of theirs
        for ours, mapped in mapping.items():
            for theirs in targets_of(mapped, ours, lora):
                part = theirs.removesuffix(".weight").rpartition(".")[2]
                self._places[f"{key_prefix_of(ours)}{part}."] = (mapped, theirs)
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}

    def take(self, key: str, tensor: torch.Tensor) -> None:
        """Keep a tensor of an update."""
        beginning, _, name = key.rpartition(".")
        self._tensors.setdefault(f"{beginning}.", {})[name] = tensor

    @cached_property
    def each(self) -> Each:
        """``A`` and ``B`` of each weight of transformers', ``B`` in its own order of rows; asked when all are taken."""
        found: Each = {}
        for beginning, tensors in self._tensors.items():
            mapped, theirs = self._places[beginning]
            segments = [tensors[name] for name in sorted(tensors) if name.startswith("B")]
            found[theirs] = (tensors["A"], self._in_their_order(mapped, theirs, torch.cat(segments)))
        return found

    def merge(self, theirs: dict[str, torch.Tensor], transposed: bool) -> None:
        """Add the updates to whole weights of transformers', in place."""
        for name, weight in theirs.items():
            if name in self.each:
                down, up = self.each[name]
                update = self.lora.scale * (up.float() @ down.float())
                weight.copy_(weight.float() + (update.t() if transposed else update))

    def _in_their_order(self, mapped: TensorMapping, theirs: str, up: torch.Tensor) -> torch.Tensor:
        if type(mapped) is Same:
            return up
        whole = up.size(0) * len(mapped.names)  # asked by those alone whose parts are of one size
        rows = [
            torch.arange(row.start, row.start + row.count, device=up.device)
            for row in mapped.rows(whole, self._heads)
            if row.name == theirs
        ]
        found = torch.empty_like(up)
        found[torch.cat(rows)] = up
        return found
