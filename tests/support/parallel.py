"""What runs of every family share: the layout, an adapter that starts from a truth's weights, and what to compare."""

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_megatron import MegatronModule, MegatronPrecision, MegatronStrategy
from tests.plain_gpt import ADAM, Weights

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@dataclass(frozen=True)
class Layout:
    """One line of the table of what is supported."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vp: int | None = None
    split: int | None = None
    sp: bool = False
    sharded: bool = True
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        sizes = {name: getattr(self, name) for name in ("tp", "pp", "dp", "vp")}
        parts = [f"{name}{size}" for name, size in sizes.items() if size not in (1, None)]
        parts += [f"split{self.split}"] * (self.split is not None)
        return "-".join(parts + ["sp"] * self.sp + ["replicated"] * (not self.sharded)) or "one"

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def strategy(self, **options: Any) -> MegatronStrategy:
        return MegatronStrategy(
            tp=self.tp,
            pp=self.pp,
            vp=self.vp,
            pipeline_split_rank=self.split,
            sequence_parallel=self.sp,
            distributed_optimizer=self.sharded,
            **{"log_grad_norm": True, **self.extra, **options},
        )


def trainer(layout: Layout, strategy: dict | None = None, precision: str = "32-true", **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=layout.world_size,
        strategy=layout.strategy(**(strategy or {})),
        plugins=MegatronPrecision(precision),
        **{**QUIET, **options},
    )


class FromTruth(MegatronModule):
    """An adapter's other base: it starts from the truth's weights."""

    config: Any

    def initial_weights(self) -> Weights:
        """The truth's, unsharded, under megatron-core's names."""
        raise NotImplementedError

    def configure_model(self) -> None:
        built = len(self.chunks) > 0
        super().configure_model()
        if not built:
            full = self.initial_weights()
            for name, parameter in self.named_shards():
                parameter.data.copy_(self.shard_of(full, name, parameter))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **ADAM)

    def shard_of(self, full: Weights, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        value = full[name]
        tp, rank = self.build_settings.layout.tp, self.trainer.strategy.tensor_parallel_rank
        if not getattr(parameter, "tensor_model_parallel", False):
            return value
        if "word_embeddings" in name or "output_layer" in name:
            padding = parameter.size(0) * tp - value.size(0)
            value = torch.nn.functional.pad(value, (0, 0) * (value.dim() - 1) + (0, padding))
        if "linear_fc1" in name and self.config.is_gated:
            return torch.cat([half.chunk(tp)[rank] for half in value.chunk(2)])
        return value.chunk(tp, parameter.partition_dim)[rank]

    def distance(self, full: Weights) -> float:
        """To the truth's weights, at worst; as many of them as this rank holds."""
        return max(
            float((parameter.detach() - self.shard_of(full, name, parameter)).abs().max())
            for name, parameter in self.named_shards()
        )


class Logged(Callback):
    """Keeps what was logged at each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, run: Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in run.callback_metrics.items()})


def loader(samples: Any, layout: Layout, rows: int, run: Trainer, **options: Any) -> DataLoader:
    """Batch i of all replicas together is batch i of the truth; Lightning shuffles what it samples itself."""
    sampler = DistributedSampler(samples, num_replicas=layout.dp, rank=run.strategy.data_parallel_rank, shuffle=False)
    return DataLoader(samples, batch_size=rows // layout.dp, sampler=sampler, **options)


def predict_and_train(
    module: FromTruth,
    samples: list[Any],
    layout: Layout,
    rows: int,
    steps: int,
    full: Weights,
    accumulate: int = 1,
    **strategy: Any,
) -> dict[str, Any]:
    """Predict the first batch, then train, on this rank."""
    logged = Logged()
    run = trainer(layout, strategy, max_steps=steps, callbacks=[logged], accumulate_grad_batches=accumulate)
    predicted = [
        p if isinstance(p, tuple) else (p,) for p in run.predict(module, loader(samples[:rows], layout, rows, run))
    ]
    run.fit(module, loader(samples, layout, rows // accumulate, run))
    return {
        "logits": [torch.cat(parts) for parts in zip(*predicted, strict=True)],  # of all replicas
        "steps": logged.steps,
        "distance": module.distance(full),
    }
