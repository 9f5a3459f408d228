"""Plain modules on one rank that ask for what no schedule gives: weights and checkpoints as vanilla Lightning's."""

import os
import signal

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_megatron import MegatronStrategy
from tests.support.ranks import run_ranks
from tests.support.trainer import QUIET


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).pow(2).mean()

    def train_dataloader(self):
        rows = torch.randn(24, 32, generator=torch.Generator().manual_seed(5))
        return torch.utils.data.DataLoader(rows, batch_size=4)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch).pow(2).mean())
            optimizer.step()


class Several(Manual):
    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch).pow(2).mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in self.parameters()]


class Skips(Plain):
    """Every other batch, with a momentum that would go on by itself."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


class OwnBackward(Plain):
    def backward(self, loss):
        (2 * loss).backward()


class Iterates(Plain):
    def training_step(self, dataloader_iter):
        return super().training_step(*next(dataloader_iter)[:2])


class SecondOrder(Plain):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class OwnOptimizer(Plain):
    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters(), lr=0.1)


class LeavesOut(Plain):
    def configure_optimizers(self):
        return torch.optim.Adam([self.layer.weight], lr=0.1)


CASES = {
    "parameters in no group": (LeavesOut, dict),
    "manual": (Manual, dict),
    "several": (Several, dict),
    "skips": (Skips, dict),
    "skips the end of a window": (Skips, lambda: {"accumulate_grad_batches": 2}),
    "backward": (OwnBackward, dict),
    "dataloader_iter": (Iterates, dict),
    "LBFGS": (SecondOrder, dict),
    "another optimizer": (OwnOptimizer, dict),
    "clipped by value": (Plain, lambda: {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
    "pruning": (Plain, lambda: {"callbacks": [ModelPruning("l1_unstructured", amount=0.5)]}),
}


def fit(module, strategy, options, steps, checkpoint=None):
    made = module()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        use_distributed_sampler=False,
        max_steps=steps,
        **QUIET,
        **options(),
    )
    trainer.fit(made, ckpt_path=checkpoint, weights_only=False)
    return trainer, {name: value.clone() for name, value in made.state_dict().items()}


def differences(folder):
    """Where six steps of ours, the last two after a resume, are not six steps of vanilla Lightning's."""
    found = []
    for name, (module, options) in CASES.items():
        seed_everything(3)
        vanilla, wanted = fit(module, "auto", options, 6)
        seed_everything(3)
        if name in ("manual", "several", "another optimizer", "backward"):
            first, _ = fit(module, MegatronStrategy(), options, 4)
            first.save_checkpoint(folder / name)
            seed_everything(4)
            ours, seen = fit(module, MegatronStrategy(), options, 6, folder / name)
        else:
            ours, seen = fit(module, MegatronStrategy(), options, 6)
        same = seen.keys() == wanted.keys() and all(seen[n].equal(wanted[n]) for n in wanted)
        if not same or ours.global_step != vanilla.global_step:
            found.append((name, ours.global_step, vanilla.global_step, seen, wanted))
    return found


def test_what_no_schedule_gives_is_vanillas_to_the_bit(tmp_path):
    assert run_ranks(1, differences, tmp_path)[0] == []


class Told(Plain):
    def training_step(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


def told_to_end():
    """What hears of SIGTERM beside the strategy: the program's own handler, and ``trainer.received_sigterm``."""
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    trainer = Trainer(accelerator="cpu", strategy=MegatronStrategy(), max_steps=2, **QUIET)
    with pytest.raises(SIGTERMException):
        trainer.fit(Told())
    assert heard == [signal.SIGTERM]
    assert trainer.received_sigterm


def back_to_the_schedule():
    """A Trainer whose module trains by the schedule after one that did not, and the error of a step without a loss."""
    for module in (Manual, Plain, Manual, Plain):
        Trainer(accelerator="cpu", strategy=MegatronStrategy(), max_steps=2, **QUIET).fit(module())
    model = BoringModel()
    model.training_step = lambda batch, batch_idx: {"a": 1}
    with pytest.raises(Exception, match="the 'loss' key needs to be present"):
        Trainer(accelerator="cpu", strategy=MegatronStrategy(), max_steps=2, **QUIET).fit(model)
    model.training_step = lambda batch, batch_idx: 1.0
    with pytest.raises(Exception, match="must return a Tensor, a dict, or None"):
        Trainer(accelerator="cpu", strategy=MegatronStrategy(), max_steps=2, **QUIET).fit(model)
    model.training_step = lambda batch, batch_idx: None
    trainer = Trainer(accelerator="cpu", strategy=MegatronStrategy(), max_steps=2, **QUIET)
    trainer.strategy.world_size = 2  # as Lightning's tests set it
    with pytest.raises(RuntimeError, match="returning None in distributed training is not supported"):
        trainer.fit(model)


def test_lightnings_own_words_and_ways_back():
    run_ranks(1, back_to_the_schedule)


def before_a_run(path):
    """What a Trainer saves and loads that has not run."""
    trainer, module = Trainer(accelerator="cpu", strategy=MegatronStrategy(), **QUIET), Plain()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    other = Trainer(accelerator="cpu", strategy=MegatronStrategy(), **QUIET).strategy.load_checkpoint(path)
    assert torch.equal(other["state_dict"]["layer.weight"], module.layer.weight)


def test_a_trainer_that_has_not_run_saves_and_loads(tmp_path):
    run_ranks(1, before_a_run, tmp_path / "one.ckpt")


def test_the_programs_own_handler_of_signals_is_called():
    run_ranks(1, told_to_end)
