"""A run that was stopped and resumed in the same layout is the uninterrupted run, to the last bit."""

import dataclasses
import functools
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_megatron import GPTModule
from lightning_megatron.training.optimizer import ShardedOptimizer
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import Rows, Watch, text_samples
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import trainer

CONFIG = dataclasses.replace(plain_gpt.GPT2, num_layers=4, hidden_dropout=0.2, attention_dropout=0.2)
SAMPLES = 40


class Scheduled(GPTModule):
    """Learning rates that tell every step from every other."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Augmented(Rows):
    """Draws from all three of the host's random states."""

    def __getitem__(self, i):
        row = super().__getitem__(i)
        drop = (torch.rand(row["tokens"].shape) < 0.1) | torch.tensor(np.random.rand() < 0.1)
        return {**row, "loss_mask": row["loss_mask"] * ~drop * (0.5 + 0.5 * (random.random() < 0.5))}


class Stream(IterableDataset):
    """Each replica's rows, read one after the other; no state of its own."""

    def __init__(self, samples, replica, replicas):
        self.rows, self.replica, self.replicas = Rows(samples), replica, replicas

    def __iter__(self):
        order = torch.randperm(len(self.rows)).tolist()  # the same on each replica: drawn from the shared data's state
        yield from (self.rows[i] for i in order[self.replica :: self.replicas])


class Stateful:
    """A loader with ``state_dict``; of unknown length where ``sized`` is false."""

    def __init__(self, samples, batch_size, replica, replicas):
        self.rows, self.batch_size, self.replica, self.replicas = Rows(samples), batch_size, replica, replicas
        self.given, self.resumed = 0, 0

    def __iter__(self):
        self.given, self.resumed = self.resumed, 0
        numbers = range(self.replica, len(self.rows), self.replicas)
        while (start := self.given * self.batch_size) + self.batch_size <= len(numbers):
            self.given += 1
            rows = [self.rows[i] for i in numbers[start : start + self.batch_size]]
            yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.resumed = state["given"]


class SizedStateful(Stateful):
    def __len__(self):
        return len(range(self.replica, len(self.rows), self.replicas)) // self.batch_size


def loader(kind: str, layout: Layout, replica: int, workers: int):
    samples = text_samples(CONFIG, SAMPLES)
    batch_size = 4 // layout.dp
    if kind in ("shuffled", "sampler"):
        return DataLoader(Rows(samples), batch_size=batch_size, shuffle=True, num_workers=workers)
    if kind == "augmented":
        return DataLoader(Augmented(samples), batch_size=batch_size, shuffle=True)
    if kind == "stream":
        return DataLoader(Stream(samples, replica, layout.dp), batch_size=batch_size, num_workers=workers)
    make = SizedStateful if kind == "sized" else Stateful
    return make(samples, batch_size, replica, layout.dp)


def _train(
    layout, kind, workers, precision, accumulate, steps,
    load=None, save=None, every=None, seed=11, epochs=-1, extra=(), evaluate=False,
):  # fmt: skip
    seed_everything(seed, verbose=False)
    watch = Watch()
    callbacks = [watch, *extra]
    if every is not None:
        callbacks.append(ModelCheckpoint(every, every_n_train_steps=1, save_top_k=-1, filename="{step}"))
    run = trainer(
        layout,
        None,
        precision,
        loss_scale=2.0**24,
        max_steps=steps,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        callbacks=callbacks,
        enable_checkpointing=every is not None,
        use_distributed_sampler=kind != "sampler",
    )
    module = Scheduled(CONFIG)
    run.fit(module, loader(kind, layout, run.strategy.data_parallel_rank, workers), ckpt_path=load)
    if evaluate:
        held_out = DataLoader(Rows(text_samples(CONFIG, 8)), batch_size=4 // layout.dp, shuffle=True)
        for evaluation in (run.validate, run.test, run.predict):
            torch.rand(3)
            evaluation(module, held_out)
    if save is not None:
        run.save_checkpoint(save)
    optimizer = run.strategy.optimizers[0]
    assert isinstance(optimizer, ShardedOptimizer)
    return {
        "losses": watch.losses,
        "norms": watch.norms,
        "weights": {name: value.detach().clone() for name, value in module.named_parameters()},
        "moments": [optimizer.state[held.main_param]["exp_avg"].clone() for held in optimizer.parameter_slices()],
        "lr": optimizer.param_groups[0]["lr"],
        "scale": optimizer.loss_scale,
        "skipped": optimizer.skipped_steps,
        "epoch": run.current_epoch,
        "batches": run.fit_loop.epoch_loop.batch_progress.total.processed,
    }


def assert_same(resumed: dict, whole: dict) -> None:
    count = len(resumed["losses"])
    assert count
    assert resumed["losses"] == whole["losses"][-count:]
    norms = [n for n in resumed["norms"] if n is not None][-3:]
    assert norms == whole["norms"][-len(norms) :]
    for name, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], value), name
    for one, other in zip(resumed["moments"], whole["moments"], strict=True):
        assert torch.equal(one, other)
    for name in ("lr", "scale", "skipped", "epoch", "batches"):
        assert resumed[name] == whole[name], name


def _stop_and_resume(layout, kind, workers, precision, accumulate, stop, steps, folder):
    run = functools.partial(_train, layout, kind, workers, precision, accumulate)
    whole = run(steps)
    run(stop, save=f"{folder}/stopped.ckpt")
    assert_same(run(steps, load=f"{folder}/stopped.ckpt", seed=99), whole)
    return whole["losses"]


# An epoch has ten batches: 4 and 7 stop in the first, 10 at its end, 13 in the second.
CASES = [
    (Layout(), "shuffled", 0, "32-true", 1, 4),
    (Layout(tp=2), "shuffled", 0, "32-true", 1, 10),
    (Layout(tp=2, sp=True), "shuffled", 2, "32-true", 1, 13),
    (Layout(pp=2, vp=2), "shuffled", 0, "32-true", 1, 13),
    (Layout(dp=2), "shuffled", 2, "bf16-mixed", 1, 4),
    (Layout(dp=2), "sampler", 0, "32-true", 1, 13),
    (Layout(tp=2), "sampler", 2, "32-true", 1, 13),
    (Layout(pp=2), "augmented", 0, "32-true", 1, 7),
    (Layout(dp=2, sharded=False), "augmented", 0, "bf16-mixed", 1, 13),
    (Layout(dp=2), "stream", 0, "32-true", 1, 7),
    (Layout(tp=2), "stream", 1, "32-true", 1, 13),
    (Layout(dp=2), "sized", 0, "32-true", 1, 7),
    (Layout(dp=2), "unsized", 0, "32-true", 1, 7),
    (Layout(pp=2), "unsized", 0, "32-true", 1, 13),
    (Layout(tp=2, pp=2, sp=True), "shuffled", 0, "16-mixed", 1, 4),
    (Layout(dp=2, sharded=False), "shuffled", 0, "16-mixed", 1, 7),
    (Layout(pp=2), "shuffled", 0, "bf16-true", 1, 7),
    (Layout(dp=2), "shuffled", 0, "32-true", 3, 4),
    (Layout(tp=2), "shuffled", 0, "bf16-mixed", 3, 5),
    (Layout(cp=2), "augmented", 0, "bf16-mixed", 3, 5),
    (Layout(cp=2, dp=2), "sized", 0, "32-true", 1, 7),
]


@pytest.mark.parametrize(("layout", "kind", "workers", "precision", "accumulate", "stop"), CASES, ids=str)
def test_stopped_and_resumed_is_uninterrupted(tmp_path, layout, kind, workers, precision, accumulate, stop):
    arguments = (layout, kind, workers, precision, accumulate, stop, stop + 8, str(tmp_path))
    losses = run_in_pool(layout.world_size, _stop_and_resume, *arguments)[0]
    assert len(set(losses)) > 8


def _from_any_step(layout, accumulate, folder):
    run = functools.partial(_train, layout, "shuffled", 0, "32-true", accumulate)
    whole = run(12, every=folder)
    for step in (1, 5, 10, 11):  # an epoch has ten batches
        resumed = run(12, load=f"{folder}/step={step}.ckpt", seed=99)
        assert_same(resumed, whole)


@pytest.mark.parametrize(("layout", "accumulate"), [(Layout(tp=2), 1), (Layout(dp=2), 3)], ids=str)
def test_from_any_step_that_a_callback_saved(tmp_path, layout, accumulate):
    run_in_pool(2, _from_any_step, layout, accumulate, str(tmp_path))


class Inside(Callback):
    """Saves in the middle of an accumulation window of three batches, in an epoch's second or first."""

    def __init__(self, path, epoch, batch_idx):
        self.path, self.epoch, self.batch_idx = path, epoch, batch_idx

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch_idx):
            trainer.save_checkpoint(self.path)


def _mid_window(kind, path, epoch=0, batch_idx=4):
    run = functools.partial(_train, Layout(dp=2), kind, 0, "32-true", 3)
    whole = run(6)
    run(3 + 2 * epoch, extra=[Inside(path, epoch, batch_idx)])
    assert_same(run(6, load=path, seed=99), whole)


@pytest.mark.parametrize(("epoch", "batch_idx"), [(0, 4), (0, 1)])
def test_from_the_middle_of_an_accumulation_window(epoch, batch_idx, tmp_path):
    run_in_pool(2, _mid_window, "shuffled", f"{tmp_path}/inside.ckpt", epoch, batch_idx)


def test_a_loader_that_cannot_go_back_is_not_saved_inside_a_window(tmp_path):
    with pytest.raises(RankError, match="2 batches into an accumulation window.*cannot go back"):
        run_ranks(2, _mid_window, "sized", f"{tmp_path}/inside.ckpt", timeout=60)


class Order(Callback):
    """Notes epoch, batch and steps, and saves behind one batch."""

    def __init__(self, path=None):
        self.path, self.seen = path, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx, trainer.global_step))
        if self.path and self.seen[-1][:2] == (1, 0):
            trainer.save_checkpoint(self.path)


def _first_window_of_an_epoch(path):
    def run(order, load=None):
        rows = Rows(text_samples(plain_gpt.GPT2, 24))
        made = trainer(Layout(), max_epochs=3, accumulate_grad_batches=2, callbacks=[order])
        made.fit(GPTModule(plain_gpt.GPT2), DataLoader(rows, batch_size=4, shuffle=True), ckpt_path=load)
        return order.seen

    return run(Order(path)), run(Order(), path)


def test_the_first_window_of_a_later_epoch_is_run_again(tmp_path):
    ((whole, resumed),) = run_in_pool(1, _first_window_of_an_epoch, f"{tmp_path}/first.ckpt")
    assert resumed == whole[6:]


def _evaluate_before_the_save(layout, precision, path):
    run = functools.partial(_train, layout, "shuffled", 0, precision, 3)
    whole = run(9)
    run(4, evaluate=True, save=path)
    assert_same(run(9, load=path, seed=99), whole)


@pytest.mark.parametrize(("layout", "precision"), [(Layout(tp=2), "32-true"), (Layout(dp=2), "bf16-mixed")], ids=str)
def test_evaluations_between_the_fit_and_the_save_leave_no_trace(layout, precision, tmp_path):
    run_in_pool(2, _evaluate_before_the_save, layout, precision, f"{tmp_path}/evaluated.ckpt")


def _untrained(path):
    rows = DataLoader(Rows(text_samples(plain_gpt.GPT2, 8)), batch_size=4)
    fitted, module = trainer(Layout(), max_steps=1), GPTModule(plain_gpt.GPT2)
    fitted.fit(GPTModule(plain_gpt.GPT2), rows)
    fitted.validate(module, rows, verbose=False)  # another module than the optimizer is of
    fitted.save_checkpoint(path)
    resumed = trainer(Layout(), max_steps=3)
    with pytest.warns(UserWarning, match="had not trained: the optimizer starts without state"):
        resumed.fit(GPTModule(plain_gpt.GPT2), rows, ckpt_path=path)
    return resumed.global_step


def test_a_checkpoint_of_a_module_that_was_only_evaluated_starts_the_optimizer_anew(tmp_path):
    assert run_in_pool(1, _untrained, f"{tmp_path}/untrained.ckpt") == [3]


class Seeing(GPTModule):
    """Notes the samples it trains on, by a number in their first token's place."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def on_train_batch_start(self, batch, batch_idx):
        self.seen += batch["number"].tolist()

    def get_batch(self, batch):
        return super().get_batch({name: value for name, value in batch.items() if name != "number"})


def _see(layout, batch_size, steps, load=None, save=None):
    seed_everything(5, verbose=False)
    module = Seeing(plain_gpt.GPT2)
    samples = text_samples(plain_gpt.GPT2, 48)
    rows = Rows({**samples, "number": torch.arange(48)})
    run = trainer(layout, max_steps=steps, max_epochs=1 if steps < 0 else -1)
    run.fit(module, DataLoader(rows, batch_size=batch_size, shuffle=True), ckpt_path=load)
    if save:
        run.save_checkpoint(save)
    return run.strategy.data_parallel_rank, module.seen


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((Layout(dp=4), 2), (Layout(dp=2), 4)),
        ((Layout(dp=4), 2), (Layout(tp=2, dp=2), 2)),
        ((Layout(), 4), (Layout(dp=2), 4)),
        ((Layout(cp=2, dp=2), 2), (Layout(), 4)),
        ((Layout(dp=2), 2), (Layout(cp=2), 4)),
    ],
    ids=str,
)
def test_each_sample_once_under_another_number_of_replicas(tmp_path, before, after):
    path = str(tmp_path / "part.ckpt")
    (layout, rows), (other, other_rows) = before, after
    first = dict(run_in_pool(layout.world_size, _see, layout, rows, 4, None, path))
    second = dict(run_in_pool(other.world_size, _see, other, other_rows, -1, path))
    numbers = sum([*first.values(), *second.values()], [])
    assert sorted(numbers) == list(range(48))


def test_samples_that_make_no_whole_batches_are_refused(tmp_path):
    path = str(tmp_path / "part.ckpt")
    run_in_pool(2, _see, Layout(dp=2), 4, 1, None, path)
    with pytest.raises(
        RankError, match="consumed 8 samples.*not a whole number of batches of 5 on 1 replicas.*batch_size=8"
    ):
        run_in_pool(1, _see, Layout(), 5, -1, path)
