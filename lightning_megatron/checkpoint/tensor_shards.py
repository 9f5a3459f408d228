"""``ShardSpec``: which part of the whole model's tensor a rank's tensor is, under any layout.

For weights, megatron-core's ``sharded_state_dict`` says it. Optimizer state follows the weights: the distributed
optimizer holds a flat slice of a weight, which is cut into blocks here. (megatron-core 0.16.1 no longer has flat
shards; its own ``fully_reshardable`` format gathers them on one rank, which costs memory and time.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from lightning_megatron.distributed import process_groups

Box = tuple[tuple[int, ...], tuple[int, ...]]  # the offsets and sizes of a block, by dimension

# Each layer is stored under its number in the whole model, not stacked with the others, so that stages may differ.
_METADATA = {"non_homogeneous_layers": True}


@dataclass(frozen=True)
class Region:
    """A block of a local tensor, and its offset in the whole model's tensor."""

    local: Box
    offset: tuple[int, ...]


@dataclass(frozen=True)
class ShardSpec:
    """Which part of the whole model's tensor a local tensor is.

    Args:
        key: The name of the whole model's tensor.
        shape: The shape of the whole model's tensor, without the padding of a vocabulary.
        local_shape: The shape of the local tensor.
        regions: The blocks of the local tensor that belong to the whole model's tensor; the rest is padding.
        replica_id: (pipeline, tensor, data-parallel) number of this copy; the copy with zeros is written.
    """

    key: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    regions: tuple[Region, ...]
    replica_id: tuple[int, int, int]

    @property
    def is_padded(self) -> bool:
        """Whether a part of the local tensor is padding."""
        return sum(math.prod(region.local[1]) for region in self.regions) < math.prod(self.local_shape)

    @property
    def is_whole(self) -> bool:
        """Whether the local tensor is the whole model's tensor, apart from padding."""
        return self.regions == (Region((_zeros(self.shape), self.shape), _zeros(self.shape)),)

    def split_over_replicas(self) -> ShardSpec:
        """The spec of a tensor of which data-parallel ranks hold slices, not copies."""
        return replace(self, replica_id=(*self.replica_id[:2], 0))

    def shards(self, tensor: torch.Tensor, key: str) -> list[ShardedTensor]:
        """Make megatron-core's shards of ``key`` from views of ``tensor``, which has the local shape."""
        return [_shard(key, tensor[_slices(r.local)], self.shape, r.offset, self.replica_id) for r in self.regions]

    def flat_shards(self, flat: torch.Tensor, start: int, key: str) -> list[ShardedTensor]:
        """Make shards of ``key`` from ``flat``, the slice of the flattened local tensor from ``start``."""
        found = []
        done = 0
        for offset, sizes in _boxes(self.local_shape, start, start + flat.numel()):
            count = math.prod(sizes)
            part = flat[done : done + count].view(sizes)
            done += count
            for region in self.regions:
                common = _intersection((offset, sizes), region.local)
                if common is not None:
                    inside = tuple(c - o for c, o in zip(common[0], offset, strict=True))
                    shift = (g - r for g, r in zip(region.offset, region.local[0], strict=True))
                    where = tuple(c + s for c, s in zip(common[0], shift, strict=True))
                    view = part[_slices((inside, common[1]))]
                    found.append(_shard(key, view, self.shape, where, self.replica_id))
        return found

    def unsplit_shard(self, tensor: torch.Tensor, key: str) -> ShardedTensor:
        """Make a shard of a tensor of another shape, which goes with an undivided weight."""
        return _shard(key, tensor, tensor.shape, _zeros(tuple(tensor.shape)), self.replica_id)

    def scalar_shard(self, value: torch.Tensor, key: str, is_first: bool) -> ShardedTensor:
        """Make a shard of a number that goes with the tensor; the rank with the tensor's first element writes it."""
        begins = is_first and bool(self.regions) and not any(self.regions[0].offset)
        return _shard(key, value.reshape(1), (1,), (0,), self.replica_id if begins else (1, *self.replica_id[1:]))


def shard_specs(module: pl.LightningModule) -> dict[str, ShardSpec]:
    """The spec of each tensor of the module on this rank, by its name in ``state_dict()``."""
    found: dict[str, ShardSpec] = {}
    chunks = getattr(module, "chunks", ()) if hasattr(module, "build_settings") else ()
    rows = getattr(getattr(module, "config", None), "vocab_size", None)
    for number, chunk in enumerate(chunks):
        found |= {f"chunks.{number}.{name}": spec for name, spec in chunk_shard_specs(chunk, rows).items()}
    place, copy = process_groups.coordinates(), process_groups.data_parallel().rank()
    everything = torch.nn.Module.state_dict(module, keep_vars=True)  # includes what an overridden state_dict leaves out
    for name, tensor in {**everything, **module.state_dict(keep_vars=True)}.items():
        if name not in found and isinstance(tensor, torch.Tensor):
            shape = tuple(tensor.shape)
            whole = (Region((_zeros(shape), shape), _zeros(shape)),)
            spec = ShardSpec(name, shape, shape, whole, (place.pp, place.tp, copy))
            found[name] = _divided_as_marked(spec, tensor)
    return found


def chunk_shard_specs(chunk: Any, rows: int | None) -> dict[str, ShardSpec]:
    """The spec of each tensor of one of megatron-core's models, by its name in ``state_dict()``.

    Args:
        chunk: The model.
        rows: Size of the vocabulary without its padding; None for a model without a vocabulary.
    """
    return {
        name: _divided_as_marked(_shard_spec(entry, rows), entry.data)
        for name, entry in chunk.sharded_state_dict(metadata=dict(_METADATA)).items()
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }


def _divided_as_marked(spec: ShardSpec, tensor: torch.Tensor) -> ShardSpec:
    """The spec of a tensor that was taken for whole, though its layer marks it as one rank's part of a weight.

    The layers of ``megatron.core.tensor_parallel`` mark their weights. In a module that has no ``sharded_state_dict``
    (a plain LightningModule, a ``torch.nn.ModuleList`` in a model), nobody asks them where their part belongs.
    """
    tp = process_groups.tensor_parallel().size()
    if tp == 1 or not getattr(tensor, "tensor_model_parallel", False) or spec.shape != spec.local_shape:
        return spec
    dim, blocks = tensor.partition_dim, tensor.partition_stride  # type: ignore[attr-defined]
    rank, size = process_groups.coordinates().tp, spec.local_shape[dim] // blocks  # of one of the blocks

    def along(value: int, rest: tuple[int, ...]) -> tuple[int, ...]:
        return (*rest[:dim], value, *rest[dim + 1 :])

    start, sizes = _zeros(spec.shape), along(size, spec.local_shape)
    regions = tuple(
        Region((along(block * size, start), sizes), along((block * tp + rank) * size, start)) for block in range(blocks)
    )
    whole = along(spec.local_shape[dim] * tp, spec.shape)
    return replace(spec, shape=whole, regions=regions, replica_id=(spec.replica_id[0], 0, spec.replica_id[2]))


def specs_by_parameter(module: pl.LightningModule, where: dict[str, ShardSpec]) -> dict[int, ShardSpec]:
    """The specs of a module's parameters by the parameters' ``id``; ``where`` has them by name."""
    everything = torch.nn.Module.state_dict(module, keep_vars=True)
    return {id(p): where[name] for name, p in everything.items() if name in where}


def _shard_spec(entry: ShardedTensor | ShardedTensorFactory, rows: int | None) -> ShardSpec:
    """Make the spec from megatron-core's description; ``rows`` is the size of the vocabulary without padding."""
    tensor = entry.data
    shape = tuple(tensor.shape)
    if isinstance(entry, ShardedTensor):
        parts = [((_zeros(shape), shape), entry)]
    else:
        # Build it on a tensor without memory: the strides and offsets of its views show which blocks they are.
        empty = torch.empty(shape, dtype=tensor.dtype, device="meta")
        built = entry.build_fn(entry.key, empty, entry.replica_id, None)
        parts = [(_box_of_view(part.data, empty), part) for part in built]
    whole = parts[0][1].global_shape
    if parts[0][1].allow_shape_mismatch and rows is not None:
        whole = (min(rows, whole[0]), *whole[1:])
    regions = []
    for local, part in parts:
        if part.prepend_axis_num:
            raise ValueError(f"{part.key}: stacked layers are not supported; megatron-core ignored {_METADATA}.")
        inside = _intersection((part.global_offset, local[1]), (_zeros(whole), whole))
        if inside is not None:
            regions.append(Region((local[0], inside[1]), inside[0]))
    return ShardSpec(entry.key, tuple(whole), shape, tuple(regions), tuple(entry.replica_id))


def _shard(key: str, view: torch.Tensor, shape: Any, offset: Any, replica_id: Any) -> ShardedTensor:
    # `axis_fragmentations=None`: the shards need not form a regular grid.
    return ShardedTensor(key, view, view.dtype, tuple(view.shape), tuple(shape), tuple(offset), None, replica_id)


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Cut elements ``start`` to ``stop`` of a row-major tensor into blocks, in order; at most 2·dimensions - 1."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # inside one row
        for offset, sizes in _boxes(shape[1:], start - last * row, stop - last * row):
            yield (last, *offset), (1, *sizes)
        return
    for offset, sizes in _boxes(shape[1:], start - (first - 1) * row, row) if start < first * row else ():
        yield (first - 1, *offset), (1, *sizes)
    if first < last:
        yield (first, *_zeros(shape[1:])), (last - first, *shape[1:])
    for offset, sizes in _boxes(shape[1:], 0, stop - last * row):
        yield (last, *offset), (1, *sizes)


def _box_of_view(view: torch.Tensor, base: torch.Tensor) -> Box:
    if view.stride() != base.stride():
        raise ValueError(f"A view of shape {tuple(view.shape)} is no block of a tensor of shape {tuple(base.shape)}.")
    rest, offset = int(view.storage_offset()), []
    for stride in base.stride():
        offset.append(rest // stride)
        rest %= stride
    return tuple(offset), tuple(view.shape)


def _intersection(one: Box, other: Box) -> Box | None:
    starts = tuple(max(a, b) for a, b in zip(one[0], other[0], strict=True))
    stops = (min(a + n, b + m) for a, n, b, m in zip(*one, *other, strict=True))
    sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    return None if any(size <= 0 for size in sizes) else (starts, sizes)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(*box, strict=True))


def _zeros(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (0,) * len(shape)
