"""Trains ``plain_gpt``'s model under the strategy, and says what to compare."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_megatron import GPTConfig, GPTModule, MegatronPrecision, MegatronStrategy
from tests.plain_gpt import ADAM, Weights, initial_weights


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
        parts = [
            f"{name}{value}" for name in ("tp", "pp", "dp", "vp") if (value := getattr(self, name)) not in (1, None)
        ]
        parts += [] if self.split is None else [f"split{self.split}"]
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


class Rows(Dataset):
    """Samples as rows of dicts."""

    def __init__(self, samples: dict[str, torch.Tensor]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(next(iter(self.samples.values())))

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {name: value[i] for name, value in self.samples.items()}


def text_samples(config: GPTConfig, rows: int) -> dict[str, torch.Tensor]:
    """Real text (a module of the standard library) as Megatron batches, with ragged loss masks."""
    length = config.seq_length
    text = Path(re.__file__).read_bytes()
    ids = torch.tensor([byte % config.vocab_size for byte in text[: rows * length + 1]])
    mask = torch.ones(rows, length)
    for row in range(rows):
        mask[row, length - row % 5 * 3 :] = 0  # 0, 3, 6, 9 or 12 tokens less
    tokens = ids[:-1].view(rows, length)
    return {"tokens": tokens, "labels": ids[1:].view(rows, length), "loss_mask": mask}


class LoadedGPT(GPTModule):
    """Starts from the truth's weights."""

    def configure_model(self) -> None:
        built = len(self.chunks) > 0
        super().configure_model()
        if not built:
            full = initial_weights(self.config)
            for name, parameter in self.named_shards():
                parameter.data.copy_(self.shard_of(full, name, parameter))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **ADAM)

    def shard_of(self, full: Weights, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        value = full[name]
        layout, rank = self.build_settings.layout, self.trainer.strategy.tensor_parallel_rank
        if not getattr(parameter, "tensor_model_parallel", False):
            return value
        if "word_embeddings" in name or "output_layer" in name:
            padding = parameter.size(0) * layout.tp - value.size(0)
            value = torch.nn.functional.pad(value, (0, 0, 0, padding))
        if "linear_fc1" in name and self.config.activation == "swiglu":
            return torch.cat([half.chunk(layout.tp)[rank] for half in value.chunk(2)])
        return value.chunk(layout.tp, parameter.partition_dim)[rank]


class Watch(Callback):
    """Keeps losses and gradient norms of each optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        if trainer.global_step > len(self.norms):
            self.norms.append(trainer.strategy.optimizers[0].grad_norm)


def train(
    config: GPTConfig,
    layout: Layout,
    rows: int,
    steps: int,
    clip: float = 0.5,
    accumulate: int = 1,
    precision: str = "32-true",
    full: Weights | None = None,
    total_rows: int | None = None,
    loss_reduction: str = "token",
    **options: Any,
) -> dict[str, Any]:
    """Train on this rank; with the final weights of the truth in ``full``, the worst distance to them."""
    module, watch = LoadedGPT(config, loss_reduction=loss_reduction), Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=layout.world_size,
        strategy=layout.strategy(**options),
        plugins=MegatronPrecision(precision),
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    samples = Rows(text_samples(config, total_rows or rows * steps))
    # Lightning shuffles what it samples itself; here batch i of the truth is batch i of all replicas together.
    replica = trainer.strategy.data_parallel_rank
    sampler = DistributedSampler(samples, num_replicas=layout.dp, rank=replica, shuffle=False)
    trainer.fit(module, DataLoader(samples, batch_size=rows // layout.dp // accumulate, sampler=sampler))
    distance = 0.0
    for name, parameter in module.named_shards() if full else ():
        distance = max(distance, float((parameter.detach() - module.shard_of(full, name, parameter)).abs().max()))
    return {"losses": watch.losses, "norms": watch.norms, "distance": distance, "steps": trainer.global_step}
