"""What runs of every family share: the layout, an adapter that starts from a truth's weights, and what to compare."""

from typing import Any

import torch

from lightning_megatron import MegatronModule
from tests.reference.plain_gpt import ADAM, Weights
from tests.support.layout import Layout
from tests.support.trainer import Logged, loader, trainer


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
