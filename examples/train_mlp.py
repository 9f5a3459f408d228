"""Train a multilayer perceptron of your own whose wide layer is shared out over two ranks (tp=2), on a CPU."""

import argparse
import math

import torch
from lightning.pytorch import Trainer, seed_everything
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch.utils.data import DataLoader

from lightning_megatron import MegatronModule, MegatronStrategy, ModelChunk


class MLP(ModelChunk):
    """Two features to three classes; the columns of ``up`` and the rows of ``down`` are shared out."""

    def __init__(self, config):
        super().__init__(config)
        init, wide, narrow = config.init_method, config.ffn_hidden_size, config.hidden_size
        self.up = ColumnParallelLinear(2, wide, config=config, init_method=init, gather_output=False)
        self.down = RowParallelLinear(
            wide, narrow, config=config, init_method=init, bias=True, input_is_parallel=True, skip_bias_add=False
        )
        self.head = torch.nn.Linear(narrow, 3)  # a layer of torch's: each rank holds all of it

    def forward(self, points, labels=None):
        """Logits ``[b, 3]``."""
        wide, _ = self.up(points)  # [b, wide / tp]; the second is a bias, which is added already
        narrow, _ = self.down(wide.relu())  # [b, narrow]
        return self.head(narrow.relu())


class MLPModule(MegatronModule):
    """Trains the perceptron."""

    def build_model(self, pre_process, post_process, vp_stage):
        """This rank's part of the model."""
        return MLP(
            self.transformer_config(hidden_size=32, ffn_hidden_size=256, init_method=torch.nn.init.kaiming_uniform_)
        )

    def loss(self, output, batch):
        """The loss of a micro-batch."""
        return torch.nn.functional.cross_entropy(output, batch["labels"])


def spirals(count, seed):
    """Points on the three arms of a spiral; the arm is the label."""
    generator = torch.Generator().manual_seed(seed)
    radius, labels = torch.rand(count, generator=generator), torch.arange(count) % 3
    angle = 2 * math.pi * (radius + labels / 3) + 0.1 * torch.randn(count, generator=generator)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return [{"points": point, "labels": label} for point, label in zip(points, labels, strict=True)]


def main():
    """Train, and print the loss on other points."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2)
    args = parser.parse_args()
    seed_everything(1)
    module = MLPModule(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    strategy = MegatronStrategy(tp=args.tp)
    trainer = Trainer(accelerator="cpu", devices=args.devices, strategy=strategy, max_epochs=4, logger=False)
    trainer.fit(module, DataLoader(spirals(3000, 1), batch_size=50, shuffle=True))
    trainer.validate(module, DataLoader(spirals(300, 2), batch_size=100))


if __name__ == "__main__":
    main()
