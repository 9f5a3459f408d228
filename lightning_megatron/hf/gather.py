"""Gathers the whole model's tensors from the shards of all ranks, one tensor after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from lightning_megatron.checkpoint.tensor_shards import shard_specs
from lightning_megatron.distributed import collectives, process_groups

Kind = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class _Part:
    """A rectangle of a whole tensor that one rank holds."""

    rank: int
    offset: tuple[int, ...]
    sizes: tuple[int, ...]


def on_first_rank(path: Path, write: Callable[[], None], beside: Callable[[], None] = lambda: None) -> None:
    """Write on the first rank, while the others do what is ``beside`` it.

    Raises:
        RuntimeError: The first rank could not write ``path``; on every rank.
    """
    problem = [""]
    if dist.get_rank() == 0:
        try:
            if path.is_file():
                raise NotADirectoryError(f"{path} is a file; name a directory")
            write()
        except Exception as error:
            problem = [f"{type(error).__name__}: {error}"]
    else:
        beside()
    dist.broadcast_object_list(problem, src=0, group=process_groups.gloo_world())
    if problem[0]:
        raise RuntimeError(f"{path} was not saved. {problem[0]}")


class WholeTensors:
    """What all ranks hold together. All of them make one, and read it to the end.

    Args:
        module: A built module.
        first: Names of the tensors that come before all others.
        only: Names of the tensors to gather; None takes all.

    Attributes:
        kinds: Shape and type of each whole tensor, by its name in the model; the same on every rank.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        first: Callable[[str], bool] = lambda _: False,
        only: Callable[[str], bool] | None = None,
    ) -> None:
        state = module.state_dict()
        rank = dist.get_rank()
        self._mine: dict[str, list[torch.Tensor]] = {}
        told: dict[str, tuple[Kind, list[_Part]]] = {}
        for name, spec in shard_specs(module).items():
            if any(spec.replica_id) or spec.key in told or (only is not None and not only(spec.key)):
                continue
            shards = spec.shards(state[name], spec.key)
            self._mine[spec.key] = [shard.data for shard in shards]
            parts = [_Part(rank, tuple(shard.global_offset), tuple(shard.data.shape)) for shard in shards]
            told[spec.key] = ((spec.shape, state[name].dtype), parts)
        self.kinds: dict[str, Kind] = {}
        self._parts: dict[str, list[_Part]] = {}
        for found in collectives.gather(told, process_groups.gloo_world()):
            for key, (kind, parts) in found.items():
                self.kinds[key] = kind
                self._parts.setdefault(key, []).extend(parts)
        self.kinds = {key: self.kinds[key] for key in sorted(self.kinds, key=lambda key: (not first(key), key))}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Each whole tensor on the first rank, and its name alone on the others."""
        for key, (shape, dtype) in self.kinds.items():
            whole = torch.empty(shape, dtype=dtype, device="cpu") if dist.get_rank() == 0 else None
            mine: Any = iter(self._mine.get(key, ()))
            for part in self._parts[key]:
                self._bring(part, mine, whole)
            yield key, whole

    def _bring(self, part: _Part, mine: Iterator[torch.Tensor], whole: torch.Tensor | None) -> None:
        rank = dist.get_rank()
        if part.rank == rank and whole is None:
            dist.send(next(mine).detach().cpu().contiguous(), 0, group=process_groups.gloo_world())
        elif whole is not None:
            where = tuple(slice(o, o + n) for o, n in zip(part.offset, part.sizes, strict=True))
            if part.rank == rank:
                whole[where] = next(mine).detach().cpu()
            else:
                taken = torch.empty(part.sizes, dtype=whole.dtype, device="cpu")
                dist.recv(taken, part.rank, group=process_groups.gloo_world())
                whole[where] = taken
