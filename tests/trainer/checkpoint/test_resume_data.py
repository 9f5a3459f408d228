"""Where in its data a resumed run goes on: plain modules that draw beside their data, several loaders, reloads."""

import os
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

from lightning_megatron import Checkpointing
from tests.support.layout import Layout
from tests.support.ranks import run_ranks
from tests.support.trainer import trainer

ROWS = 24  # six batches of four


class Numbers(Dataset):
    """Each sample is its number; augmented, with noise from all three of the host's random states."""

    def __init__(self, rows=ROWS, augmented=False):
        self.rows, self.augmented = rows, augmented

    def __len__(self):
        return self.rows

    def __getitem__(self, i):
        noise = torch.rand(()) + np.random.rand() + random.random() if self.augmented else torch.zeros(())
        return torch.stack([torch.tensor(float(i)), noise.float()])


class Stream(IterableDataset):
    def __init__(self, rows=ROWS):
        self.data = Numbers(rows)

    def __iter__(self):
        yield from (self.data[i] for i in torch.randperm(len(self.data)).tolist())


class SizedStream(Stream):
    def __len__(self):
        return len(self.data)


class Plain(pl.LightningModule):
    """Drops out by the host's random state, and notes what it trains on."""

    def __init__(self, loaders=None):
        super().__init__()
        self.layer, self.dropout = torch.nn.Linear(2, 4), torch.nn.Dropout(0.3)
        self.seen, self.losses, self.loaders = [], [], loaders

    def training_step(self, batch, batch_idx):
        batches = batch if isinstance(batch, list | tuple) else [batch]
        self.seen.append([b[:, 0].int().tolist() if b is not None else None for b in batches])
        loss = sum(self.dropout(self.layer(b / 10)).square().mean() for b in batches if b is not None)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        return self.loaders()


class Save(Callback):
    def __init__(self, path, at):
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer, *_):
        if self.path and trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.at:
            trainer.save_checkpoint(self.path)


def fit(loaders, batches, load=None, save=None, at=None, seed=1, layout=None, strategy=None, **options):
    """Train; the module, which has noted what it saw. ``at`` is the batch behind which ``save`` is written."""
    seed_everything(seed, verbose=False)
    module = Plain(loaders)
    options = {"max_steps": batches, "max_epochs": -1, **options}
    run = trainer(layout or Layout(), strategy, callbacks=[Save(save, at)], **options)
    run.fit(module, ckpt_path=load)
    return module


def assert_goes_on(resumed, whole, stopped=None):
    count = len(resumed.seen)
    assert 0 < count <= len(whole.seen)
    assert resumed.seen == whole.seen[-count:]
    assert resumed.losses == whole.losses[-count:]
    if stopped is not None:
        assert len(whole.seen) - count == stopped
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def _one_generator():
    return torch.Generator().manual_seed(7)


def _augmented(**options):
    return DataLoader(Numbers(augmented=True), batch_size=4, shuffle=True, **options)


def _workers(**options):
    return DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=1, **options)


def _weighted(**options):
    return DataLoader(Numbers(), 4, sampler=WeightedRandomSampler(torch.arange(1.0, ROWS + 1), ROWS), **options)


def _replaced():
    sampler = RandomSampler(Numbers(), replacement=True, generator=_one_generator())
    return DataLoader(Numbers(), 4, sampler=sampler)


# name: the loader, and whether Lightning puts a sampler of its own in
LOADERS = {
    "dropout": (lambda: DataLoader(Numbers(), 4, shuffle=True), True),
    "sampler": (lambda: DataLoader(Numbers(), 4, shuffle=True), False),
    "workers": (_workers, False),
    "workers that stay": (lambda: _workers(persistent_workers=True), False),
    "weighted": (_weighted, False),
    "replaced": (_replaced, False),
    "generator": (lambda: DataLoader(Numbers(), 4, shuffle=True, generator=_one_generator()), False),
    "augmented": (_augmented, True),
    "augmented and generator": (lambda: _augmented(generator=_one_generator()), False),
    "stream": (lambda: DataLoader(SizedStream(), 4), False),
    "stream of unknown length": (lambda: DataLoader(Stream(), 4), False),
}


def _resumed(name, folder):
    loaders, own = LOADERS[name]
    options = {"use_distributed_sampler": own}
    whole = fit(loaders, 15, **options)
    for stop in (4, 6, 9, 12):
        fit(loaders, stop, save=f"{folder}/{stop}.ckpt", at=stop, **options)
        assert_goes_on(fit(loaders, 15, load=f"{folder}/{stop}.ckpt", seed=99, **options), whole, stop)


def _slow_with_workers(names):
    return [pytest.param(name, marks=pytest.mark.slow) if "workers" in name else name for name in names]


@pytest.mark.parametrize("name", _slow_with_workers(LOADERS))
def test_a_plain_module_resumed_is_the_uninterrupted_one(tmp_path, name):
    run_ranks(1, _resumed, name, str(tmp_path))


def _by_epochs(path):
    loaders, _ = LOADERS["augmented"]
    whole = fit(loaders, -1, max_epochs=3)
    fit(loaders, -1, max_epochs=1, save=path, at=6)
    assert_goes_on(fit(loaders, -1, max_epochs=3, load=path, seed=99), whole, 6)


def test_an_epoch_s_end_of_a_run_that_counts_epochs(tmp_path):
    run_ranks(1, _by_epochs, f"{tmp_path}/stopped.ckpt")


def _combined(mode, workers=0):
    long = DataLoader(Numbers(), 4, shuffle=True, num_workers=workers)
    short = DataLoader(Numbers(augmented=not workers), 6, shuffle=True, num_workers=workers)
    return lambda: CombinedLoader([long, short], mode)


def _mixed():
    return lambda: CombinedLoader([DataLoader(Numbers(), 4, shuffle=True), DataLoader(SizedStream(), 4)], "min_size")


COMBINED = {
    "cycle": lambda: _combined("max_size_cycle"),
    "cycle with workers": lambda: _combined("max_size_cycle", 1),
    "max_size": lambda: _combined("max_size"),
    "min_size": lambda: _combined("min_size"),
    "mixed": _mixed,
}


def _several(name, folder):
    options = {"use_distributed_sampler": False}
    loaders = COMBINED[name]
    whole = fit(loaders(), 13, **options)
    length = 4 if name == "min_size" else 6
    if length == 6:
        assert sorted(sum((first for first, _ in whole.seen[:6]), [])) == list(range(ROWS))
    for stop in (3, 4, 5, 6, 9):
        fit(loaders(), stop, save=f"{folder}/{stop}.ckpt", at=stop, **options)
        assert_goes_on(fit(loaders(), 13, load=f"{folder}/{stop}.ckpt", seed=99, **options), whole, stop)


@pytest.mark.parametrize("name", _slow_with_workers(COMBINED))
def test_each_of_several_loaders_goes_on_in_its_own_place(tmp_path, name):
    run_ranks(1, _several, name, str(tmp_path))


def _inside(name, folder):
    loaders, own = LOADERS[name]
    options = {"accumulate_grad_batches": 3, "use_distributed_sampler": own}
    whole = fit(loaders, 5, **options)
    for at in (2, 4, 5, 7):
        fit(loaders, 3, save=f"{folder}/{at}.ckpt", at=at, **options)
        assert_goes_on(fit(loaders, 5, load=f"{folder}/{at}.ckpt", seed=99, **options), whole, at - at % 3)


@pytest.mark.parametrize(
    "name", _slow_with_workers(["sampler", "augmented", "augmented and generator", "workers", "stream"])
)
def test_augmentation_and_dropout_after_a_save_inside_a_window(tmp_path, name):
    run_ranks(1, _inside, name, str(tmp_path))


def _inside_a_cycle(path):
    """The window's second batch began the short loader anew."""
    loaders = _combined("max_size_cycle")
    options = {"accumulate_grad_batches": 3, "use_distributed_sampler": False}
    whole = fit(loaders, 6, **options)
    fit(_combined("max_size_cycle"), 3, save=path, at=5, **options)
    assert_goes_on(fit(_combined("max_size_cycle"), 6, load=path, seed=99, **options), whole, 3)


def test_a_window_in_which_a_loader_was_begun_anew(tmp_path):
    run_ranks(1, _inside_a_cycle, f"{tmp_path}/inside.ckpt")


def _reloaded(path, every):
    """Loaders for some epochs; Lightning gives each a sampler with the run's seed."""
    options = {"reload_dataloaders_every_n_epochs": every}
    loaders = lambda: DataLoader(Numbers(), 4, shuffle=True)  # noqa: E731
    whole = fit(loaders, -1, max_epochs=5, **options)
    for stop in (4, 6, 9):
        fit(loaders, -1, save=f"{path}/{stop}.ckpt", at=stop, max_epochs=2, **options)
        resumed = fit(loaders, -1, load=f"{path}/{stop}.ckpt", seed=99, max_epochs=5, **options)
        assert_goes_on(resumed, whole, stop)


@pytest.mark.parametrize("every", [1, 2])
def test_loaders_that_are_made_anew_keep_the_seed(tmp_path, every):
    run_ranks(1, _reloaded, str(tmp_path), every)


def _in_another_order(path):
    """Lightning's sampler shuffles what is trained on; the epoch was begun by one that does not."""
    rank, layout = int(os.environ["RANK"]), Layout(dp=2)
    sampler = DistributedSampler(Numbers(), 2, rank, shuffle=False)
    whole = fit(lambda: DataLoader(Numbers(), 4, sampler=sampler), 3, save=path, at=1, layout=layout)
    resumed = fit(lambda: DataLoader(Numbers(), 4), 6, load=path, layout=layout)
    assert resumed.seen[:2] == whole.seen[1:]
    assert sorted(sum((batch for (batch,) in resumed.seen[2:5]), [])) != sorted(sampler)  # the next is its own


def test_an_epoch_goes_on_in_the_order_of_the_sampler_that_began_it(tmp_path):
    run_ranks(2, _in_another_order, f"{tmp_path}/one.ckpt")


class KeepsPlace:
    """A loader with a ``state_dict``."""

    def __init__(self):
        self.given = self.resumed = 0

    def __iter__(self):
        self.given, self.resumed = self.resumed, 0
        while self.given < ROWS // 4:
            self.given += 1
            yield torch.stack([Numbers()[i] for i in range(4 * self.given - 4, 4 * self.given)])

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.resumed = state["given"]


class KeepsPlaceSized(KeepsPlace):
    def __len__(self):
        return ROWS // 4


def _left_out(kind, folder):
    loaders = {"plain": lambda: DataLoader(Numbers(), 4), "sized": KeepsPlaceSized, "unsized": KeepsPlace}[kind]
    whole = fit(loaders, 6, save=f"{folder}/two.ckpt", at=2)
    options = {"strategy": {"checkpointing": Checkpointing(skip_batches=2)}}
    resumed = fit(loaders, 3, load=f"{folder}/two.ckpt", save=f"{folder}/three.ckpt", at=3, **options)
    assert resumed.seen == whole.seen[4:5]
    # A restart with the same arguments does not leave out more.
    assert fit(loaders, 4, load=f"{folder}/three.ckpt", **options).seen == whole.seen[5:6]
    match = "ended after" if kind == "unsized" else "the checkpoint's epoch has 4 batches left.*Use at most 3"
    with pytest.raises(Exception, match=match):
        fit(loaders, 3, load=f"{folder}/two.ckpt", strategy={"checkpointing": Checkpointing(skip_batches=5)})


@pytest.mark.parametrize("kind", ["plain", "sized", "unsized"])
def test_batches_are_left_out_once_and_within_their_epoch(tmp_path, kind):
    run_ranks(1, _left_out, kind, str(tmp_path))


def _left_out_of_the_next(folder):
    loaders = lambda: DataLoader(Numbers(), 4)  # noqa: E731
    whole = fit(loaders, 12, save=f"{folder}/six.ckpt", at=6)
    assert (
        fit(loaders, 8, load=f"{folder}/six.ckpt", strategy={"checkpointing": Checkpointing(skip_batches=4)}).seen
        == whole.seen[10:]
    )


def test_batches_are_left_out_of_an_epoch_that_has_not_begun(tmp_path):
    run_ranks(1, _left_out_of_the_next, str(tmp_path))
