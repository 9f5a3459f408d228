"""Says which rows of transformers' tensors make up a tensor of megatron-core's, and in which order.

Nothing is computed on the way, so that a tensor that came in goes out again byte by byte. Rows are those of our tensor;
where theirs is stored transposed, they are its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

Shape = tuple[int, ...]
# Reads a rectangle, by offset and sizes, of one of their tensors.
Read = Callable[[str, Shape, Shape], torch.Tensor]


@dataclass(frozen=True)
class Heads:
    """How many heads there are, and how large.

    Args:
        query: Query heads.
        groups: Key and value heads.
        size: Channels of a head.
    """

    query: int
    groups: int
    size: int

    @classmethod
    def of(cls, config: Any) -> Heads:
        """The heads of a ``ModelConfig``."""
        size = config.kv_channels or config.hidden_size // config.num_attention_heads
        groups = getattr(config, "num_query_groups", None) or config.num_attention_heads
        return cls(config.num_attention_heads, groups, size)


@dataclass(frozen=True)
class Rows:
    """Rows of one of their tensors that lie together in ours."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class Same:
    """One tensor of transformers' as it is.

    Args:
        name: transformers' name; ``{}`` stands for the number of the layer.
        transposed: Whether transformers stores it as ``[in, out]``.
    """

    name: str
    transposed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of transformers' tensors that take part."""
        return (self.name,)

    def at(self, layer: int) -> Any:
        """This mapping with the number of a layer in its name."""
        return replace(self, name=self.name.format(layer))

    def rows(self, count: int, heads: Heads) -> Iterator[Rows]:
        """The rows of our tensor, which has ``count``, first to last."""
        yield Rows(self.name, 0, count)


@dataclass(frozen=True)
class FusedQueryKeyValue(Same):
    """All queries, then all keys, then all values in one tensor; megatron-core has a group's queries, key and value."""

    def rows(self, count: int, heads: Heads) -> Iterator[Rows]:
        """The rows, group by group."""
        keys = heads.query * heads.size
        yield from _grouped(heads, (self.name, 0), (self.name, keys), (self.name, keys + heads.groups * heads.size))


@dataclass(frozen=True)
class Stacked:
    """Several tensors, one above the other, such as the gate and what it gates."""

    parts: tuple[str, ...]
    transposed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of transformers' tensors that take part."""
        return self.parts

    def at(self, layer: int) -> Any:
        """This mapping with the number of a layer in its names."""
        return replace(self, parts=tuple(name.format(layer) for name in self.parts))

    def rows(self, count: int, heads: Heads) -> Iterator[Rows]:
        """The rows of each tensor, in turn; all tensors have equally many."""
        each = count // len(self.parts)
        for name in self.parts:
            yield Rows(name, 0, each)


@dataclass(frozen=True)
class QueryKeyValue(Stacked):
    """Queries, keys and values in three tensors."""

    def rows(self, count: int, heads: Heads) -> Iterator[Rows]:
        """The rows, group by group."""
        query, key, value = self.parts
        yield from _grouped(heads, (query, 0), (key, 0), (value, 0))


@dataclass(frozen=True)
class KeyValue(Stacked):
    """Keys and values of cross-attention in two tensors; megatron-core has a head's key and value."""

    def rows(self, count: int, heads: Heads) -> Iterator[Rows]:
        """The rows of each head, first its key's and then its value's."""
        for group in range(heads.groups):
            for name in self.parts:
                yield Rows(name, group * heads.size, heads.size)


@dataclass(frozen=True)
class ExpertColumns(Same):
    """Matrices of experts as ``[experts, in, out]``, ours being ``[experts, out, in]``; or biases ``[experts, out]``.

    Args:
        name: transformers' name; ``{}`` stands for the number of the layer.
        in_turns: Whether columns of the gate and of what it gates take turns; here one half is behind the other.
    """

    in_turns: bool = False

    def at(self, layer: int) -> Any:
        """This mapping with the number of a layer in its name."""
        return replace(self, name=self.name.format(layer))

    def their_shape(self, shape: Shape) -> Shape:
        """The shape of their tensor that makes ours."""
        return (shape[0], *reversed(shape[1:]))

    def fill(self, shape: Shape, offset: Shape, target: torch.Tensor, read: Read) -> None:
        """Fill ``target``, which lies at ``offset`` in our tensor of ``shape``."""
        whole = shape[1]
        size = whole // 2 if self.in_turns else whole
        for number, start in enumerate(range(0, whole, size)):
            low = max(offset[1], start)
            high = min(offset[1] + target.size(1), start + size)
            if low >= high:
                continue
            step = whole // size
            where = (offset[0], *offset[2:], (low - start) * step)
            sizes = (target.size(0), *target.shape[2:], (high - low) * step)
            part = read(self.name, where, sizes)[..., number::step]
            target[:, low - offset[1] : high - offset[1]].copy_(part if part.dim() == 2 else part.transpose(1, 2))

    def theirs(self, ours: torch.Tensor) -> torch.Tensor:
        """Their tensor that makes ours, whole and contiguous."""
        columns = ours if ours.dim() == 2 else ours.transpose(1, 2)
        if self.in_turns:
            columns = torch.stack(columns.chunk(2, dim=-1), dim=-1).flatten(-2)
        return columns.contiguous()


TensorMapping = Same | Stacked
# By the name of our tensor.
WeightMapping = dict[str, TensorMapping]


UPDATE = "_lora"  # ends the name of what is beside a layer that has low-rank updates


def is_update(key: str) -> bool:
    """Whether a tensor of ours is one of an update's, of which transformers' model knows nothing."""
    return f"{UPDATE}." in key


def table(entries: Mapping[str, str | TensorMapping], layers: int = 0) -> WeightMapping:
    """A family's names; entries with ``{}`` stand for each of the layers. A plain name is a tensor as it is."""
    found: WeightMapping = {}
    for ours, theirs in entries.items():
        mapped = Same(theirs) if isinstance(theirs, str) else theirs
        if "{}" in ours:
            found |= {ours.format(layer): mapped.at(layer) for layer in range(layers)}
        else:
            found[ours] = mapped
    return found


def renamed(mapped: TensorMapping, beginning: str, other: str) -> TensorMapping:
    """The same of tensors whose names begin with ``other`` in place of ``beginning``."""

    def of(name: str) -> str:
        return other + name.removeprefix(beginning) if name.startswith(beginning) else name

    if isinstance(mapped, Stacked):
        return replace(mapped, parts=tuple(map(of, mapped.parts)))
    return replace(mapped, name=of(mapped.name))


def their_shapes(mapped: TensorMapping, shape: Shape, heads: Heads) -> dict[str, Shape]:
    """The shapes of their tensors that make ours of ``shape``."""
    if isinstance(mapped, ExpertColumns):
        return {mapped.name: mapped.their_shape(shape)}
    counts: dict[str, int] = {}
    for rows in mapped.rows(shape[0], heads):
        counts[rows.name] = counts.get(rows.name, 0) + rows.count
    shapes = {name: (count, *shape[1:]) for name, count in counts.items()}
    return {name: found[::-1] if mapped.transposed else found for name, found in shapes.items()}


def assemble(
    mapped: TensorMapping, shape: Shape, heads: Heads, offset: Shape, target: torch.Tensor, read: Read
) -> None:
    """Fill ``target``, which lies at ``offset`` in our tensor of ``shape``, from their tensors."""
    if isinstance(mapped, ExpertColumns):
        mapped.fill(shape, offset, target, read)
        return
    start, stop = offset[0], offset[0] + target.size(0)
    first = 0  # our row
    for rows in _joined(mapped.rows(shape[0], heads)):
        low, high = max(first, start), min(first + rows.count, stop)
        if low < high:
            where = (rows.start + low - first, *offset[1:])
            sizes = (high - low, *target.shape[1:])
            part = read(rows.name, *((where[::-1], sizes[::-1]) if mapped.transposed else (where, sizes)))
            target[low - start : high - start].copy_(part.t() if mapped.transposed else part)
        first += rows.count


def take_apart(mapped: TensorMapping, ours: torch.Tensor, heads: Heads) -> dict[str, torch.Tensor]:
    """Their tensors that make ours, whole and contiguous."""
    if isinstance(mapped, ExpertColumns):
        return {mapped.name: mapped.theirs(ours)}
    if type(mapped) is Same:
        return {mapped.name: (ours.t() if mapped.transposed else ours).contiguous()}
    shapes = their_shapes(mapped, tuple(ours.shape), heads)
    theirs = {name: torch.empty(shape, dtype=ours.dtype, device=ours.device) for name, shape in shapes.items()}
    first = 0
    for rows in _joined(mapped.rows(ours.size(0), heads)):
        target = theirs[rows.name].t() if mapped.transposed else theirs[rows.name]
        target[rows.start : rows.start + rows.count].copy_(ours[first : first + rows.count])
        first += rows.count
    return theirs


def _grouped(heads: Heads, query: tuple[str, int], key: tuple[str, int], value: tuple[str, int]) -> Iterator[Rows]:
    """Each group's queries, its key and its value, from where each kind begins in its tensor."""
    each = heads.query // heads.groups * heads.size
    for group in range(heads.groups):
        yield Rows(query[0], query[1] + group * each, each)
        for name, start in (key, value):
            yield Rows(name, start + group * heads.size, heads.size)


def _joined(rows: Iterator[Rows]) -> Iterator[Rows]:
    """Join rows that are neighbours in both tensors."""
    last: Rows | None = None
    for found in rows:
        if last is not None and found.name == last.name and found.start == last.start + last.count:
            last = replace(last, count=last.count + found.count)
            continue
        if last is not None:
            yield last
        last = found
    if last is not None:
        yield last
