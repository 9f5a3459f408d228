"""Quiet Trainers on the CPU, their loaders, and what they logged."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_megatron import MegatronPrecision
from tests.support.layout import Layout

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def trainer(
    layout: Layout,
    strategy: dict | None = None,
    precision: str = "32-true",
    loss_scale: float | None = None,
    **options: Any,
) -> Trainer:
    """A quiet Trainer on the CPU; ``loss_scale`` is what fp16 starts from, and other precisions have none."""
    return Trainer(
        accelerator="cpu",
        devices=layout.world_size,
        strategy=layout.strategy(**(strategy or {})),
        plugins=MegatronPrecision(precision, loss_scale if precision == "16-mixed" else None),
        **{**QUIET, **options},
    )


class Logged(Callback):
    """Keeps what was logged at each step, and its gradient norm."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_start(self, run: Trainer, *_: Any) -> None:
        run.strategy.optimizers[0].always_compute_norm = True

    def on_train_batch_end(self, run: Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in run.callback_metrics.items()})
        norm = getattr(run.strategy.optimizers[0], "grad_norm", None)
        if norm is not None:
            self.steps[-1]["grad_norm"] = norm


def loader(samples: Any, layout: Layout, rows: int, run: Trainer, **options: Any) -> DataLoader:
    """Batch i of all replicas together is batch i of the truth; Lightning shuffles what it samples itself."""
    sampler = DistributedSampler(samples, num_replicas=layout.dp, rank=run.strategy.data_parallel_rank, shuffle=False)
    return DataLoader(samples, batch_size=rows // layout.dp, sampler=sampler, **options)
