"""Trains ``plain_experts``' models plainly and under the strategy, and says what to compare."""

import functools
from dataclasses import replace
from typing import Any

import torch

from lightning_megatron import GPTConfig
from lightning_megatron.callbacks import TrainingMonitor
from tests.reference import plain_experts
from tests.reference.parallel_gpt import LoadedGPT, Rows, Watch, text_samples
from tests.reference.plain_experts import Cut, initial_weights
from tests.reference.plain_gpt import Weights
from tests.reference.same_training import CLIP, ROWS
from tests.support.layout import Layout
from tests.support.trainer import loader, trainer

STEPS = 10
EVEN, ODD = list(range(0, ROWS, 2)), list(range(1, ROWS, 2))  # the rows of two replicas


def config_of(name: str, **experts: Any) -> Any:
    config = getattr(plain_experts, name)
    return replace(config, experts=replace(config.experts, **experts))


@functools.cache
def truth(name: str, cut: str = "", means: bool = False, **experts: Any) -> dict:
    config = config_of(name, **experts)
    parts = {"": None, "replicas": Cut([EVEN, ODD]), "halves": Cut([list(range(ROWS))], [slice(0, 8), slice(8, 16)])}
    parts["micro-batches"] = Cut([EVEN[:3], EVEN[3:], ODD[:3], ODD[3:]])
    samples = text_samples(config, ROWS * STEPS)
    found = plain_experts.train(config, samples, ROWS, STEPS, CLIP, parts[cut], means=means)
    assert found["seen"].margin > 2e-5, f"a choice is too close for a comparison: {found['seen'].margin}"
    return found


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
    loss_scale: float | None = None,
    monitor: TrainingMonitor | None = None,
    make: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Train on this rank; with the final weights of the truth in ``full``, the worst distance to them.

    With ``monitor``, what it saw last of the experts, and what was logged of them.
    """
    module, watch = LoadedMixture(config, loss_reduction=loss_reduction), Watch()
    if make is not None:
        module.configure_optimizers = lambda: make(module.parameters())
    run = trainer(
        layout,
        options,
        precision,
        loss_scale,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        log_every_n_steps=1,
        callbacks=[watch, *([monitor] if monitor else [])],
    )
    samples = Rows(text_samples(config, rows * steps))
    run.fit(module, loader(samples, layout, rows // accumulate, run))
    distance = module.distance(full) if full else 0.0
    found = {"losses": watch.losses, "norms": watch.norms, "distance": distance, "steps": run.global_step}
    if monitor is not None:
        logged = {name: float(value) for name, value in run.logged_metrics.items() if name.startswith("experts/")}
        found |= {"experts": monitor.expert_load, "logged": logged}
    return found
