"""A LightningModule with no Megatron in it."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader


class PlainModule(pl.LightningModule):
    """No Megatron in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        loss = (self.layers(batch["x"]) - batch["y"]).square().mean()
        self.log("inside", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("unseen", (self.layers(batch["x"]) - batch["y"]).square().mean())

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class CountingModule(PlainModule):
    """Counts its backward passes, and notes the mode of a submodule that the user froze."""

    def __init__(self, raise_at: int | None = None):
        super().__init__()
        self.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.05)
        self.raise_at, self.backwards, self.modes = raise_at, 0, []
        self.layers[1].eval()

    def training_step(self, batch, batch_idx):
        self.modes.append((self.layers[0].training, self.layers[1].training))
        if self.trainer.fit_loop.epoch_loop.total_batch_idx == self.raise_at:
            raise RuntimeError("stop here")
        return super().training_step(batch, batch_idx)

    def on_after_backward(self):
        self.backwards += 1


def plain_data(rows=28):
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(5))
    return DataLoader([{"x": row, "y": row[:1]} for row in x], batch_size=4)
