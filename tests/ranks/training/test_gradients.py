"""Gradients and layers' buffers between the backward pass and the step: what hooks see, and may change, under DDP."""

import math
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import grad_norm
from megatron.core.distributed import DistributedDataParallelConfig
from torch.utils.data import DataLoader

from lightning_megatron import MegatronPrecision
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool, run_ranks
from tests.support.trainer import QUIET, trainer


class Watched(pl.LightningModule):
    """Looks at gradients and changes them; its batch norm keeps a running mean of each replica's rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        self.seen: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.layers(batch["x"]) - batch["y"]).square().mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append({name: float(norm) for name, norm in grad_norm(self, 2).items()})
        self.layers[0].bias.grad = torch.full_like(self.layers[0].bias, 0.01)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Halved(Callback):
    def on_after_backward(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.layers[2].weight.grad is not None:
            pl_module.layers[2].weight.grad.mul_(0.5)


def _train(strategy: Any, precision: str, accumulate: int) -> dict[str, Any]:
    torch.manual_seed(5)
    data = DataLoader(Rows({"x": torch.randn(48, 4), "y": torch.randn(48, 1)}), batch_size=4)
    callbacks = [Halved()] if accumulate == 1 else []  # inside a window vanilla's hook sees sums that are not done
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "callbacks": callbacks}
    module = Watched()
    scale = 64.0 if precision == "16-mixed" else None
    # On a CPU Lightning takes bf16 where fp16 is asked for; a plugin is asked for nothing.
    kind = {"precision": precision} if strategy == "ddp" else {"plugins": MegatronPrecision(precision, scale)}
    run = Trainer(accelerator="cpu", devices=2, strategy=strategy, **QUIET, **options, **kind)
    run.fit(module, data)
    return {"state": module.state_dict(), "seen": module.seen}


@pytest.mark.parametrize(
    ("sharded", "precision", "accumulate", "overlap"),
    [
        (True, "32-true", 1, False),
        (False, "32-true", 1, True),
        (True, "32-true", 2, True),
        (True, "16-mixed", 1, False),
        (True, "bf16-mixed", 1, False),
    ],
)
def test_hooks_see_and_change_what_they_do_under_ddp(sharded, precision, accumulate, overlap):
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=overlap, bucket_size=40)
    ours = run_in_pool(2, _train, Layout(dp=2, sharded=sharded).strategy(ddp=ddp), precision, accumulate)
    theirs = run_in_pool(2, _train, "ddp", precision, accumulate)
    close = {"rtol": 1e-4, "atol": 1e-5} if precision == "32-true" else {"rtol": 0.05, "atol": 0.01}
    for mine, reference in zip(ours, theirs, strict=True):
        assert len(mine["seen"]) == len(reference["seen"]) == 12 // accumulate
        for seen, norms in zip(mine["seen"], reference["seen"], strict=True):
            assert seen == pytest.approx(norms, rel=close["rtol"], abs=close["atol"])
        # Buffers too: those of the first replica's rows, and after the last step each replica's own.
        torch.testing.assert_close(mine["state"], reference["state"], **close)


class Summing(Callback):
    """The sum of squares of this rank's gradients, and their types."""

    def __init__(self) -> None:
        self.squares: list[float] = []
        self.types: set[torch.dtype] = set()

    def on_train_start(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.optimizers[0].always_compute_norm = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters()]
        self.types |= {gradient.dtype for gradient in gradients}
        self.squares.append(sum(float(gradient.double().square().sum()) for gradient in gradients))


def _stages(precision: str) -> dict[str, Any]:
    summing = Summing()
    config = plain_gpt.replace(plain_gpt.GPT2, tie_embeddings=False)
    run = trainer(Layout(pp=2, dp=2), None, precision, 64.0, max_steps=3, callbacks=[summing])
    norms = []
    summing.on_train_batch_end = lambda *_: norms.append(run.strategy.optimizers[0].grad_norm)
    run.fit(LoadedGPT(config), DataLoader(Rows(text_samples(config, 24)), batch_size=4))
    return {"squares": summing.squares, "types": summing.types, "norms": norms}


# fp16's and bf16's weights are not of their gradients' type, fp32.
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_every_stage_sees_its_own_part_of_the_gradients(precision):
    ranks = run_in_pool(4, _stages, precision)
    stages = {tuple(rank["squares"]) for rank in ranks}
    assert len(stages) == 2  # replicas see the same
    for norms, *squares in zip(ranks[0]["norms"], *stages, strict=True):
        assert math.sqrt(sum(squares)) == pytest.approx(norms, rel=1e-3 if precision == "bf16-true" else 1e-5)
    assert {t for rank in ranks for t in rank["types"]} == {
        torch.bfloat16 if precision == "bf16-true" else torch.float32
    }


def _warnings(factor: float | None) -> list[str]:
    class Scaling(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
            gradient = next(pl_module.parameters()).grad
            assert gradient.isfinite().all() if factor is None else gradient.mul_(factor) is gradient

    run = trainer(Layout(tp=2), max_steps=1, callbacks=[Scaling()])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.fit(LoadedGPT(plain_gpt.GPT2), DataLoader(Rows(text_samples(plain_gpt.GPT2, 8)), batch_size=4))
    return [str(warning.message) for warning in said if "Clip with self.clip_gradients" in str(warning.message)]


@pytest.mark.parametrize(("factor", "times"), [(0.5, 1), (None, 0)])
def test_changing_a_shards_gradients_is_warned_of(factor, times):
    assert [len(said) for said in run_ranks(2, _warnings, factor)] == [times, 0]


def _refrozen(ours: bool) -> Any:
    torch.manual_seed(5)
    data = DataLoader(Rows({"x": torch.randn(32, 4), "y": torch.randn(32, 1)}), batch_size=4)
    module = Watched()
    for frozen in (True, False, True):
        module.layers[0].requires_grad_(not frozen)
        strategies = {"strategy": Layout(dp=1, sharded=frozen).strategy()} if ours else {}
        module.on_before_optimizer_step = lambda optimizer: None
        # Not Adam, which makes steps of the rounding errors that a bias before a batch norm has for a gradient.
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)
        run = Trainer(accelerator="cpu", devices=1, max_epochs=1, use_distributed_sampler=False, **QUIET, **strategies)
        run.fit(module, data)
    return module.state_dict()


def test_another_fit_may_train_other_parameters_with_other_settings():
    ours, theirs = run_in_pool(1, _refrozen, True)[0], run_in_pool(1, _refrozen, False)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
