"""Trains ``plain_bert``'s models under the strategy, and says what to compare."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_megatron import BertModule
from tests import plain_bert
from tests.parallel_gpt import Layout
from tests.plain_gpt import ADAM, Weights
from tests.test_training import trainer


class LoadedBert(BertModule):
    """Starts from the truth's weights."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(plain_bert.CONFIGS[name], **options)
        self.truth = name

    def configure_model(self) -> None:
        built = len(self.chunks) > 0
        super().configure_model()
        if not built:
            full = plain_bert.megatron_weights(plain_bert.new_model(self.truth))
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
        return value.chunk(tp, parameter.partition_dim)[rank]

    def distance(self, full: Weights) -> float:
        """To the truth's weights, at worst; as many of them as this rank holds."""
        return max(
            float((parameter.detach() - self.shard_of(full, name, parameter)).abs().max())
            for name, parameter in self.named_shards()
        )


class Watch(Callback):
    """Keeps what was logged at each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, run: Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in run.callback_metrics.items()})


def loader(samples: list[Any], layout: Layout, rows: int, run: Trainer, **options: Any) -> DataLoader:
    """Batch i of all replicas together is batch i of the truth."""
    sampler = DistributedSampler(samples, num_replicas=layout.dp, rank=run.strategy.data_parallel_rank, shuffle=False)
    return DataLoader(samples, batch_size=rows // layout.dp, sampler=sampler, **options)


def train(name: str, layout: Layout, rows: int, steps: int, full: Weights, **strategy: Any) -> dict[str, Any]:
    """Predict the first batch, then train, on this rank."""
    module, watch = LoadedBert(name), Watch()
    run = trainer(layout, strategy, max_steps=steps, callbacks=[watch])
    samples = plain_bert.samples(name, rows, steps)
    predicted = [
        p if isinstance(p, tuple) else (p,) for p in run.predict(module, loader(samples[:rows], layout, rows, run))
    ]
    run.fit(module, loader(samples, layout, rows, run))
    return {
        "logits": [torch.cat(parts) for parts in zip(*predicted, strict=True)],  # of all replicas
        "steps": watch.steps,
        "distance": module.distance(full),
    }
