"""The sizes of a run, as the tests write them."""

from dataclasses import dataclass, field
from typing import Any

from lightning_megatron import MegatronStrategy
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.training.microbatches import MicroBatching


class FewMicroBatches(MicroBatching):
    """Where nobody has chosen, two micro-batches a stage: half of the default, enough for each part of a schedule."""

    def _even_count(self, layout: ParallelLayout, rows: int) -> int:
        return MicroBatching(self.size, self.count or 2 * layout.pp)._even_count(layout, rows)


@dataclass(frozen=True)
class Layout:
    """One line of the table of what is supported."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    vp: int | None = None
    split: int | None = None
    sp: bool = False
    sharded: bool = True
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        sizes = {name: getattr(self, name) for name in ("tp", "pp", "cp", "dp", "vp", "ep", "etp")}
        parts = [f"{name}{size}" for name, size in sizes.items() if size not in (1, None)]
        parts += [f"split{self.split}"] * (self.split is not None)
        return "-".join(parts + ["sp"] * self.sp + ["replicated"] * (not self.sharded)) or "one"

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def strategy(self, **options: Any) -> MegatronStrategy:
        strategy = MegatronStrategy(
            tp=self.tp,
            pp=self.pp,
            vp=self.vp,
            cp=self.cp,
            ep=self.ep,
            etp=self.etp,
            pipeline_split_rank=self.split,
            sequence_parallel=self.sp,
            distributed_optimizer=self.sharded,
            **{**self.extra, **options},
        )
        strategy.micro_batching = FewMicroBatches(strategy.micro_batching.size, strategy.micro_batching.count)
        return strategy
