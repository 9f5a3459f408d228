"""Reads the matrices of experts that files hold one by one as the one tensor that transformers' model makes of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from typing_extensions import override

from lightning_megatron.hf.file_places import Place
from lightning_megatron.hf.weight_mapping import Shape
from lightning_megatron.hf.weight_source import Source


class StackedExperts(Source):
    """A source in which the matrices of all experts are one tensor ``[experts, rows, columns]``.

    Args:
        source: The source that has them one by one.
        places: Where each tensor of the source is in the model; others are left as they are.

    Attributes:
        missing: Sentences that name the matrices which the source lacks for a stack.
    """

    def __init__(self, source: Source, places: Mapping[str, Place]) -> None:
        super().__init__(source.name, source.config, source.generation)
        self._source = source
        self._stacks: dict[str, dict[tuple[int, int], str]] = {}  # by expert and part
        self._parts: dict[str, int] = {}
        for stored, place in places.items():
            if place.expert is not None:
                self._stacks.setdefault(place.name, {})[place.expert, place.part] = stored
                self._parts[place.name] = place.parts
        held = {stored for stack in self._stacks.values() for stored in stack.values()}
        count = 1 + max((expert for stack in self._stacks.values() for expert, _ in stack), default=-1)
        self._shapes = {name: shape for name, shape in source.shapes.items() if name not in held}
        self._dtypes = {name: dtype for name, dtype in source.dtypes.items() if name not in held}
        self.missing: list[str] = []
        for name, stack in self._stacks.items():
            rows, *rest = source.shapes[next(iter(stack.values()))]
            self._shapes[name] = (count, rows * self._parts[name], *rest)
            self._dtypes[name] = source.dtypes[next(iter(stack.values()))]
            lacking = [e for e in range(count) if any((e, part) not in stack for part in range(self._parts[name]))]
            self.missing += [f"{name}: the matrix of expert {expert} is missing" for expert in lacking]
            self.missing += [
                f"{stored} has shape {source.shapes[stored]}, and another expert's {(rows, *rest)}"
                for stored in stack.values()
                if source.shapes[stored] != (rows, *rest)
            ]

    @property
    @override
    def shapes(self) -> dict[str, Shape]:
        return self._shapes

    @property
    @override
    def dtypes(self) -> dict[str, str]:
        return self._dtypes

    @override
    def read(self, name: str, offset: Shape, sizes: Shape) -> torch.Tensor:
        if name not in self._stacks:
            return self._source.read(name, offset, sizes)
        experts = range(offset[0], offset[0] + sizes[0])
        return torch.stack([self._matrix(name, expert, offset[1:], sizes[1:]) for expert in experts])

    def _matrix(self, name: str, expert: int, offset: Shape, sizes: Shape) -> torch.Tensor:
        """A rectangle of one expert's matrix; no part is read beyond it."""
        rows = self._shapes[name][1] // self._parts[name]
        found = []
        for part in range(self._parts[name]):
            start, stop = max(offset[0], part * rows), min(offset[0] + sizes[0], (part + 1) * rows)
            if start < stop:
                where, size = (start - part * rows, *offset[1:]), (stop - start, *sizes[1:])
                found.append(self._source.read(self._stacks[name][expert, part], where, size))
        return torch.cat(found)
