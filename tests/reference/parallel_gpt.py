"""Trains ``plain_gpt``'s model under the strategy, and says what to compare."""

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch.utils.data import Dataset

from lightning_megatron import GPTConfig, GPTModule
from tests.reference.from_truth import FromTruth
from tests.reference.plain_gpt import Weights, initial_weights
from tests.support.layout import Layout
from tests.support.trainer import loader, trainer


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


def packed_samples(config: GPTConfig, rows: int, *, borders: bool = False) -> dict[str, torch.Tensor]:
    """``text_samples``, each row of which is three documents, cut elsewhere in each row; no label crosses an end.

    Their positions say so, or ``borders`` between them.
    """
    samples, length = text_samples(config, rows), config.seq_length
    places = torch.arange(length)
    first = torch.tensor(
        [[1 + row * 3 % (length // 2), length // 2 + 1 + row * 5 % (length // 2 - 2)] for row in range(rows)]
    )
    starts = torch.where(places >= first[:, 1:], first[:, 1:], torch.where(places >= first[:, :1], first[:, :1], 0))
    ends = torch.zeros(rows, length).scatter(1, first - 1, 1.0)
    samples["loss_mask"] = samples["loss_mask"] * (1 - ends)
    if borders:
        return {**samples, "cu_seqlens": F.pad(F.pad(first, (1, 0)), (0, 1), value=length).int()}
    return {**samples, "position_ids": places - starts}


class LoadedGPT(FromTruth, GPTModule):
    """Starts from the truth's weights."""

    def initial_weights(self) -> Weights:
        return initial_weights(self.config)


class Watch(Callback):
    """Keeps losses and gradient norms of each optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        trainer.strategy.optimizers[0].always_compute_norm = True

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
    loss_scale: float | None = None,
    terms: dict[str, float] | None = None,
    kind: type[LoadedGPT] = LoadedGPT,
    packed: bool | str = False,
    **options: Any,
) -> dict[str, Any]:
    """Train on this rank; with the final weights of the truth in ``full``, the worst distance to them."""
    module, watch = kind(config, loss_reduction=loss_reduction, **(terms or {})), Watch()
    run = trainer(
        layout,
        options,
        precision,
        loss_scale,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[watch],
    )
    count = total_rows or rows * steps
    samples = packed_samples(config, count, borders=packed == "borders") if packed else text_samples(config, count)
    run.fit(module, loader(Rows(samples), layout, rows // accumulate, run))
    distance = module.distance(full) if full else 0.0
    return {"losses": watch.losses, "norms": watch.norms, "distance": distance, "steps": run.global_step}
