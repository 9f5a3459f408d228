"""Trains ``plain_t5``'s models under the strategy, and says what to compare."""

from typing import Any

import torch

from lightning_megatron import T5Module
from tests import plain_t5
from tests.parallel_bert import Watch, loader
from tests.parallel_gpt import Layout
from tests.plain_gpt import ADAM, Weights
from tests.test_training import trainer


class LoadedT5(T5Module):
    """Starts from the truth's weights."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(plain_t5.CONFIGS[name], **options)
        self.truth = name

    def configure_model(self) -> None:
        built = len(self.chunks) > 0
        super().configure_model()
        if not built:
            full = plain_t5.megatron_weights(plain_t5.new_model(self.truth))
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
            value = torch.nn.functional.pad(value, (0, 0, 0, padding))
        if "linear_fc1" in name and self.config.is_gated:
            return torch.cat([half.chunk(tp)[rank] for half in value.chunk(2)])
        return value.chunk(tp, parameter.partition_dim)[rank]

    def distance(self, full: Weights) -> float:
        """To the truth's weights, at worst."""
        return max(float((p.detach() - self.shard_of(full, name, p)).abs().max()) for name, p in self.named_shards())


def train(name: str, layout: Layout, rows: int, steps: int, full: Weights, **strategy: Any) -> dict[str, Any]:
    """Predict the first batch, then train, on this rank."""
    module, watch = LoadedT5(name), Watch()
    run = trainer(layout, strategy, max_steps=steps, callbacks=[watch])
    samples = plain_t5.samples(name, rows, steps)
    logits = torch.cat(run.predict(module, loader(samples[:rows], layout, rows, run)))
    run.fit(module, loader(samples, layout, rows, run))
    losses = [step["train_loss"] for step in watch.steps]
    return {"logits": logits, "losses": losses, "distance": module.distance(full)}
