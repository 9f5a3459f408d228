"""The low-rank update of one linear layer, sharded over tensor-parallel ranks as the layer is."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from lightning_megatron.distributed import process_groups
from lightning_megatron.hf.weight_mapping import Heads, TensorMapping
from lightning_megatron.models.lora.config import LoRA


class Adapter(torch.nn.Module):
    """Updates of a layer: one for each of transformers' layers that it is made of.

    Their products with ``B`` come in the order of this layer's rows, so that a rank's rows are one behind the other.

    Args:
        linear: megatron-core's layer.
        mapped: transformers' weights that the layer's weight is made of.
        chosen: Those of transformers' weights that are updated.
        heads: The attention heads of the model.
        lora: Rank, scale and dropout of the updates.
        halves: Whether the rows are a gate and what it gates, of which a rank has a part each.
    """

    def __init__(
        self, linear: Any, mapped: TensorMapping, chosen: list[str], heads: Heads, lora: LoRA, halves: bool
    ) -> None:
        super().__init__()
        self.lora = lora
        self.chosen = chosen
        self.is_column = isinstance(linear, ColumnParallelLinear)
        self.sequence_parallel = bool(linear.config.sequence_parallel)
        weight = linear.weight
        size, rank = process_groups.tensor_parallel().size(), process_groups.tensor_parallel().rank()
        rows = weight.size(0) * (size if self.is_column else 1)
        self.first_input = 0 if self.is_column else rank * weight.size(1)
        self.num_inputs = weight.size(1) * (1 if self.is_column else size)
        all_rows = list(mapped.rows(rows, heads))
        # Of each row of the whole layer, whose it is, and which of theirs; on the host, whatever the model's device.
        numbers = {name: number for number, name in enumerate(chosen)}
        self.owner = torch.cat([torch.full((row.count,), numbers.get(row.name, -1), device="cpu") for row in all_rows])
        self.theirs = torch.cat([_numbers(row.start, row.start + row.count) for row in all_rows])
        here = _rows_here(weight.size(0), rank, size, halves) if self.is_column else _numbers(0, rows)
        self.num_rows = len(here)
        # Of each update: its rows among this rank's; and which of the whole layer, by the names of B's parts.
        self.places = [(self.owner[here] == number).nonzero().flatten() for number in range(len(chosen))]
        self.segments = [self._segments(number, here, halves) for number in range(len(chosen))]
        self.parts = [name.removesuffix(".weight").rpartition(".")[2] for name in chosen]
        for part, segments in zip(self.parts, self.segments, strict=True):
            update = torch.nn.ParameterDict({"A": torch.nn.Parameter(weight.new_empty(lora.rank, weight.size(1)))})
            for name, segment in segments.items():
                update[name] = torch.nn.Parameter(weight.new_zeros(len(segment), lora.rank))
            self.add_module(part, update)
        self._mark()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The update of the layer's output ``[s, b, out]`` (or ``[s/tp, b, out]``), as the layer lays it out."""
        down = torch.cat([self._part(part)["A"] for part in self.parts])  # [parts · rank, in]
        hidden = torch.nn.functional.linear(self._dropped(inputs), down)
        if self.is_column:
            hidden = self._for_all_columns(hidden)
        elif self.sequence_parallel:
            hidden = reduce_scatter_to_sequence_parallel_region(hidden)
        else:
            hidden = reduce_from_tensor_model_parallel_region(hidden)
        return torch.nn.functional.linear(hidden, self._up()) * self.lora.scale

    def fill(self, number: int, down: torch.Tensor, up: torch.Tensor) -> None:
        """Take this rank's part of an update.

        Args:
            number: Index of the update among those of this layer.
            down: ``A``, ``[rank, in]``.
            up: ``B``, ``[out, rank]``, rows in the order of transformers' layer.
        """
        part = self._part(self.parts[number])
        with torch.no_grad():
            part["A"].copy_(down[:, self.first_input : self.first_input + part["A"].size(1)])
            for name, rows in self.segments[number].items():
                part[name].copy_(up[self.theirs[rows]])

    def shapes(self, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of ``A`` and ``B`` of an update, whole."""
        return (self.lora.rank, self.num_inputs), (int((self.owner == number).sum()), self.lora.rank)

    def start(self, number: int, seed: int) -> None:
        """The first weights of an update, the same whatever the layout: those of a linear layer, and zeros."""
        generator = torch.Generator("cpu").manual_seed(seed)
        bound = 1 / math.sqrt(self.num_inputs)  # torch's `kaiming_uniform_(a=√5)`
        whole = torch.empty(self.lora.rank, self.num_inputs, device="cpu").uniform_(-bound, bound, generator=generator)
        self.fill(number, whole, torch.zeros(self.shapes(number)[1], device="cpu"))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """megatron-core's description of the tensors."""
        state = self.state_dict(keep_vars=True)
        axes = {name: self._axis(name) for name in state}
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {name: axis for name, axis in axes.items() if axis is not None},
            sharded_offsets,
            tp_group=process_groups.tensor_parallel(),
            dp_cp_group=(metadata or {}).get("dp_cp_group", process_groups.data_parallel()),
        )

    def _axis(self, name: str) -> int | None:
        """The axis along which a tensor is sharded; None if every rank has all of it."""
        is_down = name.endswith(".A")
        if self.is_column:
            return None if is_down else 0
        return 1 if is_down else None

    def _mark(self) -> None:
        """Say of each parameter what megatron-core must know to sum its gradient, and to count it once."""
        for name, parameter in self.named_parameters():
            axis = self._axis(name)
            parameter.tensor_model_parallel = axis is not None  # type: ignore[attr-defined]
            parameter.partition_dim = -1 if axis is None else axis  # type: ignore[attr-defined]
            parameter.partition_stride = 1  # type: ignore[attr-defined]
            # Seen by each rank on its part of the sequence only.
            parameter.sequence_parallel = self.sequence_parallel and axis is None  # type: ignore[attr-defined]

    def _part(self, name: str) -> Any:
        return self.get_submodule(name)

    def _segments(self, number: int, here: torch.Tensor, halves: bool) -> dict[str, torch.Tensor]:
        """The names of the parts of ``B`` on this rank, and their rows in the whole layer."""
        found = [rows[self.owner[rows] == number] for rows in here.chunk(2 if halves else 1)]
        found = [rows for rows in found if len(rows)]
        return {"B" if len(found) == 1 else f"B{index}": rows for index, rows in enumerate(found)}

    def _up(self) -> torch.Tensor:
        """``B`` of all updates side by side, ``[out here, parts · rank]``."""
        columns = []
        for part, segments, places in zip(self.parts, self.segments, self.places, strict=True):
            up = torch.cat([self._part(part)[name] for name in segments])
            if len(places) < self.num_rows:  # the others' rows are zero
                up = up.new_zeros(self.num_rows, self.lora.rank).index_copy(0, places.to(up.device), up)
            columns.append(up)
        return torch.cat(columns, dim=1)

    def _for_all_columns(self, hidden: torch.Tensor) -> torch.Tensor:
        """What every rank's columns are made from; its gradient is the sum of theirs."""
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        return copy_to_tensor_model_parallel_region(hidden)

    def _dropped(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.lora.dropout:
            return inputs
        if self.is_column and not self.sequence_parallel:  # ranks have the same inputs, and drop the same
            return torch.nn.functional.dropout(inputs, self.lora.dropout)
        with get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(inputs, self.lora.dropout)


def _rows_here(count: int, rank: int, size: int, halves: bool) -> torch.Tensor:
    """The numbers, in the whole layer, of this rank's rows."""
    if not halves:
        return _numbers(rank * count, (rank + 1) * count)
    half = count // 2
    gate = _numbers(rank * half, (rank + 1) * half)
    return torch.cat([gate, gate + half * size])


def _numbers(first: int, end: int) -> torch.Tensor:
    return torch.arange(first, end, device="cpu")
