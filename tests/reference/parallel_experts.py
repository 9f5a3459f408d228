"""Trains ``plain_experts``' model under the strategy, and says what to compare."""

from typing import Any

import torch

from lightning_megatron import GPTConfig
from tests.reference.parallel_gpt import LoadedGPT, Rows, Watch, text_samples
from tests.reference.plain_experts import initial_weights
from tests.reference.plain_gpt import Weights
from tests.support.layout import Layout
from tests.support.trainer import loader, trainer


class LoadedMixture(LoadedGPT):
    """Starts from the truth's weights."""

    def initial_weights(self) -> Weights:
        return initial_weights(self.config)

    def shard_of(self, full: Weights, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        if ".experts." not in name:
            return super().shard_of(full, name, parameter)
        layout = self.build_settings.layout
        rank = self.trainer.global_rank % (layout.world_size // layout.pp)
        etp, ep = rank % layout.expert_tp, rank // layout.expert_tp % layout.ep
        value = full[name].chunk(layout.ep)[ep]
        if "linear_fc1" in name:
            return torch.cat([half.chunk(layout.expert_tp, 1)[etp] for half in value.chunk(2, 1)], 1)
        return value.chunk(layout.expert_tp, 2)[etp]


def train(
    config: GPTConfig,
    layout: Layout,
    rows: int,
    steps: int,
    clip: float,
    accumulate: int = 1,
    full: Weights | None = None,
    precision: str = "32-true",
    loss_reduction: str = "token",
    **options: Any,
) -> dict[str, Any]:
    """Train on this rank; with the final weights of the truth in ``full``, the worst distance to them."""
    module, watch = LoadedMixture(config, loss_reduction=loss_reduction), Watch()
    run = trainer(
        layout,
        options,
        precision,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[watch],
    )
    samples = Rows(text_samples(config, rows * steps))
    run.fit(module, loader(samples, layout, rows // accumulate, run))
    distance = module.distance(full) if full else 0.0
    return {"losses": watch.losses, "norms": watch.norms, "distance": distance, "steps": run.global_step}
