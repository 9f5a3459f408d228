"""The truth of updates of experts: ``plain_experts``, whose weights are frozen, with low-rank products beside them."""

from typing import Any

import torch

from lightning_megatron import GPTConfig, LoRA
from tests.reference import plain_experts
from tests.reference.parallel_experts import LoadedMixture
from tests.reference.parallel_gpt import Rows, Watch, text_samples
from tests.reference.plain_gpt import Weights
from tests.support.layout import Layout
from tests.support.trainer import loader, trainer


def updates(c: GPTConfig, lora: LoRA) -> Weights:
    """``A`` and ``B`` of each weight that ``lora`` names, by megatron-core's names, and what it trains whole."""
    generator = torch.Generator().manual_seed(11)
    found = {}
    for name, weight in plain_experts.initial_weights(c).items():
        layer = name.removesuffix(".weight")
        if "linear_" in name and lora.matches(layer):
            *experts, rows, columns = weight.shape
            for part, shape in (("A", (lora.rank, columns)), ("B", (rows, lora.rank))):
                found[f"{layer}_lora.{part}"] = torch.randn(*experts, *shape, generator=generator) * 0.1
        elif layer in lora.also_train:
            found[name] = weight
    return found


def train(c: GPTConfig, lora: LoRA, rows: int, steps: int, clip: float) -> dict[str, Any]:
    """As ``plain_experts.train``, whose final weights are those that are trained."""
    frozen = plain_experts.initial_weights(c)

    def of_model(trained: Weights) -> Weights:
        found = {**frozen, **{name: weight for name, weight in trained.items() if "_lora." not in name}}
        for name in trained:
            if name.endswith(".A"):
                weight = name.replace("_lora.A", ".weight")
                found[weight] = frozen[weight] + lora.scale * trained[f"{name[:-1]}B"] @ trained[name]
        return found

    samples = text_samples(c, rows * steps)
    return plain_experts.train(c, samples, rows, steps, clip, adapted=(updates(c, lora), of_model))


class UpdatedMixture(LoadedMixture):
    """Starts from the truth's weights and updates."""

    def initial_weights(self) -> Weights:
        return {**super().initial_weights(), **updates(self.config, self.lora)}

    def shard_of(self, full: Weights, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        layer, is_update, part = name.partition("_lora.")
        if not is_update:
            return super().shard_of(full, name, parameter)
        whole = full[f"{layer}_lora.{part[-1]}"]
        divided = "B" if "linear_fc1" in name else "A"
        if ".experts." not in name or part[-1] == divided:
            return super().shard_of({name: whole}, name, parameter)
        layout = self.build_settings.layout
        rank = self.trainer.global_rank % (layout.world_size // layout.pp)
        return whole.chunk(layout.ep)[rank // layout.expert_tp % layout.ep]

    def trained_distance(self, full: Weights) -> float:
        """To the truth, of what is trained; infinite if a frozen weight has moved."""
        start, worst = self.initial_weights(), 0.0
        for name, parameter in self.named_shards():
            weights = {**full, **{name: start[name]}} if not parameter.requires_grad else full
            away = float((parameter.detach() - self.shard_of(weights, name, parameter)).abs().max())
            worst = max(worst, away if parameter.requires_grad or away == 0 else float("inf"))
        return worst


def train_on_rank(
    config: GPTConfig, lora: LoRA, layout: Layout, rows: int, steps: int, clip: float, full: Weights, **options: Any
) -> dict[str, Any]:
    """Train on this rank, and say how far the updates are from the truth's."""
    module, watch = UpdatedMixture(config, lora=lora), Watch()
    run = trainer(layout, options, max_steps=steps, gradient_clip_val=clip, callbacks=[watch])
    run.fit(module, loader(Rows(text_samples(config, rows * steps)), layout, rows, run))
    return {
        "losses": watch.losses,
        "norms": watch.norms,
        "distance": module.trained_distance(full),
        "steps": run.global_step,
        "held": sum(getattr(p, "main_grad", None) is not None for p in module.parameters() if not p.requires_grad),
    }
