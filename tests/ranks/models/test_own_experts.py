"""Experts in a model of the user's own train as plain ones do, however they are divided, and nothing is warned of."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_megatron import ExpertLayer, Experts, MegatronModule, ModelChunk
from lightning_megatron.callbacks import TrainingMonitor
from tests.reference import plain_experts, plain_gpt
from tests.reference.plain_experts import Cut, Seen
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool
from tests.support.trainer import Logged, loader, trainer

WIDTH, LENGTH, ROWS, STEPS = 8, 6, 4, 3
EXPERTS = Experts(num=4, top_k=2, ffn_hidden_size=10, balancing="seq_aux", aux_weight=0.5, z_weight=0.01)
CONFIG = replace(plain_experts.MIXTURE, experts=EXPERTS)
NAME = "decoder.layers.0.mlp."


class Mixed(ModelChunk):
    """One layer of experts."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mixture = ExpertLayer(config, layer_number=3)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        hidden = self.split_sequence(x.transpose(0, 1).contiguous())  # [s/tp, b, h]
        weights = self.split_sequence(keep.t().contiguous()).t()  # of the tokens in the loss, [b, s/tp]
        output, _ = self.mixture(hidden, padding_mask=weights)
        return self.join_sequence(output).transpose(0, 1)


class OfMixed(MegatronModule):
    """Learns to turn tokens around."""

    experts = EXPERTS

    def build_model(self, pre_process: bool, post_process: bool, vp_stage: int | None) -> Mixed:
        return Mixed(
            self.transformer_config(hidden_size=WIDTH, activation="swiglu", experts=self.experts, add_bias_linear=False)
        )

    def on_fit_start(self) -> None:
        layout, rank = self.build_settings.layout, self.trainer.global_rank
        with torch.no_grad():
            for name, weight in first_weights().items():
                own = weight.chunk(layout.ep)[rank % layout.ep] if ".experts." in name else weight
                self.chunks[0].mixture.get_parameter(name.removeprefix(NAME)).copy_(own)

    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        return (errors(output, batch) * batch["keep"]).sum(), batch["keep"].sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **plain_gpt.ADAM)


def errors(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return (output - batch["x"].flip(-1)).square().mean(-1)


def first_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    shapes = {"router": (4, WIDTH), "experts.linear_fc1": (4, 20, WIDTH), "experts.linear_fc2": (4, WIDTH, 10)}
    return {f"{NAME}{name}.weight": torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def rows() -> list[dict[str, torch.Tensor]]:
    x = torch.randn(ROWS * STEPS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(5))
    keep = torch.ones(ROWS * STEPS, LENGTH)
    keep[1::2, 4:] = 0
    return [{"x": row, "keep": mask} for row, mask in zip(x, keep, strict=True)]


def plain() -> tuple[list[float], list[float], float]:
    """Losses and gradient norms of the steps, and the loss of all rows behind them."""
    weights = {name: weight.requires_grad_() for name, weight in first_weights().items()}
    optimizer = torch.optim.AdamW(weights.values(), **plain_gpt.ADAM)
    losses, norms = [], []

    def mean_loss(batch: Any, seen: Seen) -> torch.Tensor:
        cut, keep = Cut([list(range(len(batch["x"])))]), batch["keep"]
        output = plain_experts.mixture(CONFIG, weights, 0, batch["x"], keep, cut, seen)
        assert seen.margin > 2e-5, "a choice is too close for a comparison"
        return (errors(output, batch) * keep).sum() / keep.sum()

    for batch in DataLoader(rows(), batch_size=ROWS):
        seen, keep = Seen(), batch["keep"]
        loss = mean_loss(batch, seen)
        optimizer.zero_grad()
        (loss + torch.stack(seen.losses).sum() / keep.sum()).backward()
        norms.append(float(torch.nn.utils.get_total_norm([weight.grad for weight in weights.values()])))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms, float(mean_loss(next(iter(DataLoader(rows(), batch_size=ROWS * STEPS))), Seen()).detach())


def fit(layout: Layout, path: str) -> dict[str, Any]:
    module, watch = OfMixed(), Logged()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(layout, max_epochs=1, log_every_n_steps=1, callbacks=[watch, TrainingMonitor(expert_layers=True)])
        run.fit(module, loader(rows(), layout, ROWS, run))
    run.save_checkpoint(f"{path}/{layout}")
    return {
        "losses": [step["train_loss"] for step in watch.steps],
        "norms": [step["grad_norm"] for step in watch.steps],
        "warned": [str(each.message) for each in caught if "differ between" in str(each.message)],
        "shown": "experts/layer_2/entropy" in run.logged_metrics,
    }


def resume(layout: Layout, path: str) -> float:
    module = OfMixed()
    (found,) = trainer(layout).validate(module, DataLoader(rows(), batch_size=ROWS // layout.dp), ckpt_path=path)
    return float(found["val_loss"])


def test_divided_experts_train_as_plain_ones_and_move_to_another_layout(tmp_path):
    losses, norms, after = plain()
    layouts = [Layout(tp=2, sp=True, etp=1), Layout(tp=2, sp=True, ep=2, etp=1), Layout(dp=2, ep=2)]
    for layout in layouts:
        for seen in run_in_pool(2, fit, layout, str(tmp_path)):
            assert seen["losses"] == pytest.approx(losses, rel=1e-5), layout
            assert seen["norms"] == pytest.approx(norms, rel=1e-4), layout
            assert seen["warned"] == []
            assert seen["shown"]
    values = [run_in_pool(2, resume, to, f"{tmp_path}/{of}") for of, to in zip(layouts, reversed(layouts), strict=True)]
    assert all(each == pytest.approx(after, rel=1e-5) for ranks in values for each in ranks)


class Mean(OfMixed):
    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        return errors(output, batch).mean()


class WithBlock(OfMixed):
    def build_model(self, *_: Any) -> Any:
        return ModelChunk(super().build_model(True, True, None).config).transformer_block()


class Divided(OfMixed):
    experts = replace(EXPERTS, num=3, top_k=1, normalize_top_k=False)


REFUSED = {
    "mean": (Mean, {}, Layout(dp=2, ep=2), "weighed by tokens. Return the sum over tokens"),
    "micro-batches": (OfMixed, {"loss_reduction": "micro_batch"}, Layout(dp=2, ep=2), "loss_reduction='token'"),
    "no sequence parallelism": (OfMixed, {}, Layout(tp=2, etp=1), "trained with sequence_parallel=True"),
    "a block": (WithBlock, {}, Layout(dp=2, ep=2), "lightning_megatron.ExpertLayer"),
    "three experts": (Divided, {}, Layout(dp=2, ep=2), "Experts.num=3"),
}  # fmt: skip


def try_to_fit(kind: type[OfMixed], options: dict, layout: Layout) -> str:
    try:
        trainer(layout, max_steps=1).fit(kind(**options), DataLoader(rows(), batch_size=2))
    except (TypeError, ValueError, MisconfigurationException) as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(name):
    *case, says = REFUSED[name]
    try:
        found = run_in_pool(2, try_to_fit, *case)
    except RankError as error:
        found = [str(error)] * 2
    assert all(says in each for each in found), found
