"""Callbacks that average weights, on plain modules: the weights, losses and checkpoints of vanilla DDP."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch.utils.data import DataLoader

from tests.reference.parallel_gpt import Rows
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import QUIET

KINDS: dict[str, Any] = {
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2),
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "mean": WeightAveraging,
}


class Normed(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.layers(batch["x"]) - batch["y"]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", (self.layers(batch["x"]) - batch["y"]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def _fit(layout: Layout | None, kind: str, folder: str) -> Any:
    torch.manual_seed(5)
    rows = Rows({"x": torch.randn(32, 4), "y": torch.randn(32, 1)})
    given = (DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=8))

    def made(epochs: int) -> Trainer:
        options = {"max_epochs": epochs, "callbacks": [KINDS[kind]()], **QUIET}
        return Trainer(accelerator="cpu", devices=2, strategy=layout.strategy() if layout else "ddp", **options)

    whole, half, resumed = Normed(), Normed(), Normed()
    run = made(4)
    run.fit(whole, *given)
    seen = [{name: float(value) for name, value in run.callback_metrics.items()}, whole.state_dict()]
    if kind != "swa":  # which, in vanilla too, ends otherwise when it is resumed
        first = made(2)
        first.fit(half, *given)
        first.save_checkpoint(f"{folder}/half.ckpt")
        made(4).fit(resumed, *given, ckpt_path=f"{folder}/half.ckpt", weights_only=False)
        seen += [half.state_dict(), resumed.state_dict()]
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "replicated"])
def test_averages_are_vanillas(kind, sharded, tmp_path):
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        folder.mkdir()
    ours = run_in_pool(2, _fit, Layout(dp=2, sharded=sharded), kind, str(tmp_path / "ours"))
    theirs = run_in_pool(2, _fit, None, kind, str(tmp_path / "theirs"))
    for mine, reference in zip(ours, theirs, strict=True):
        mine[0].pop("grad_norm", None), mine[0].pop("train_loss", None)
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
