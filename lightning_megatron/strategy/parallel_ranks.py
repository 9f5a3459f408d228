"""The strategy's public sizes and ranks: how many ranks there are, and where this one sits in the layout."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ParallelStrategy
from typing_extensions import override

from lightning_megatron.distributed.layout import ParallelLayout


class ParallelRanks(ParallelStrategy):
    """The strategy's public sizes and ranks; known from a Trainer's construction on."""

    sizes: dict[str, Any]
    _layout: ParallelLayout | None = None
    _told_world_size: int | None = None

    def __repr__(self) -> str:
        """Show the sizes. ``lightning.Fabric(strategy=)`` shows this text when it refuses the strategy."""
        sizes = ", ".join(
            f"{name}={size}"
            for name, size in self.sizes.items()
            if size not in (None, False) and (size != 1 or name == "pipeline_split_rank")
        )
        return f"<{type(self).__name__}({sizes}) for lightning.pytorch.Trainer; Fabric has no loop that it could run>"

    @property
    def layout(self) -> ParallelLayout:
        """The sizes, checked against the number of devices; known from the Trainer's construction on."""
        if self._layout is None:
            raise RuntimeError("MegatronStrategy: the layout is known once a Trainer has taken the strategy.")
        return self._layout

    @property
    def tensor_parallel_rank(self) -> int:
        """This rank's number in its tensor-parallel group."""
        return self.layout.coordinates(self.global_rank).tp

    @property
    def tensor_parallel_size(self) -> int:
        """Number of ranks that share each layer."""
        return self.layout.tp

    @property
    def pipeline_parallel_rank(self) -> int:
        """This rank's pipeline stage."""
        return self.layout.coordinates(self.global_rank).pp

    @property
    def pipeline_parallel_size(self) -> int:
        """Number of pipeline stages."""
        return self.layout.pp

    @property
    def data_parallel_rank(self) -> int:
        """The number of the replica that this rank belongs to."""
        return self.layout.coordinates(self.global_rank).dp

    @property
    def data_parallel_size(self) -> int:
        """Number of replicas, which read different data."""
        return self.layout.dp

    @property
    def context_parallel_rank(self) -> int:
        """The number of the part of each sequence that this rank holds."""
        return self.layout.coordinates(self.global_rank).cp

    @property
    def context_parallel_size(self) -> int:
        """Number of ranks that share each sequence."""
        return self.layout.cp

    @property
    def expert_parallel_rank(self) -> int:
        """The number of the part of each layer's experts that this rank holds."""
        rank = self.global_rank % (self.layout.world_size // self.layout.pp)
        return rank // self.layout.expert_tp % self.layout.ep

    @property
    def expert_parallel_size(self) -> int:
        """Number of ranks over which a layer's experts are divided."""
        return self.layout.ep

    @property
    def is_pipeline_first_stage(self) -> bool:
        """Whether this rank is on the first pipeline stage, which holds the embedding."""
        return self.pipeline_parallel_rank == 0

    @property
    def is_pipeline_last_stage(self) -> bool:
        """Whether this rank is on the last pipeline stage, which computes the loss."""
        return self.pipeline_parallel_rank == self.layout.pp - 1

    @property
    @override
    def world_size(self) -> int:
        """Number of ranks of the run; it can be set."""
        return self._ranks if self._told_world_size is None else self._told_world_size

    @world_size.setter
    def world_size(self, size: int) -> None:
        self._told_world_size = size

    @property
    def num_processes(self) -> int:
        """Number of processes on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.data_parallel_size, "rank": self.data_parallel_rank}

    @property
    def _ranks(self) -> int:
        return super().world_size
