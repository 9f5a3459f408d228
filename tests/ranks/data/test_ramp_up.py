"""Growing batches: megatron-core's sizes, each sample once, and Lightning's counters."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, DistributedSampler

from lightning_megatron import LRSchedule, MegatronStrategy
from lightning_megatron.data import RampUp, RampUpBatches
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, Watch, text_samples
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import trainer


def _train(layout: Layout) -> tuple[list[int], list[float], int]:
    rows, watch, sizes = Rows(text_samples(plain_gpt.GPT2, 40)), Watch(), []

    class Counting(LoadedGPT):
        def on_train_batch_start(self, batch, batch_idx):
            sizes.append(len(batch["tokens"]))

    run = trainer(layout, {"micro_batch_size": 1}, max_epochs=1, use_distributed_sampler=False, callbacks=[watch])
    sampler = DistributedSampler(rows, layout.dp, run.strategy.data_parallel_rank, shuffle=False)
    batches = RampUpBatches(sampler, 8 // layout.dp, RampUp(2, 2, 20))
    run.fit(Counting(plain_gpt.GPT2), DataLoader(rows, batch_sampler=batches))
    return sizes, watch.losses, run.global_step


def test_every_batch_is_a_step_of_all_its_tokens():
    samples, expected = text_samples(plain_gpt.GPT2, 40), []
    weights = {n: w.clone().requires_grad_() for n, w in plain_gpt.initial_weights(plain_gpt.GPT2).items()}
    optimizer = torch.optim.AdamW(weights.values(), **plain_gpt.ADAM)
    sizes = [2, 2, 2, 2, 4, 4, 6, 8, 8]
    for indices in torch.arange(sum(sizes)).split(sizes):
        logits = plain_gpt.logits(plain_gpt.GPT2, weights, samples["tokens"][indices]).transpose(1, 2)
        each = torch.nn.functional.cross_entropy(logits, samples["labels"][indices], reduction="none")
        loss = (each * samples["loss_mask"][indices]).sum() / samples["loss_mask"][indices].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    for layout in (Layout(pp=2), Layout(tp=2, dp=2)):
        for seen, losses, steps in run_in_pool(layout.world_size, _train, layout):
            assert seen == [size // layout.dp for size in sizes]
            assert losses == pytest.approx(expected, rel=1e-5)
            assert steps == len(sizes)


@pytest.mark.parametrize("decay_steps", [40, None])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_schedule_counts_the_samples_of_growing_batches(decay_steps, accumulated):
    """As Megatron-LM, which moves its scheduler by the samples of each global batch."""
    rule, seen = RampUp(2, 2, 20), []

    class Module(BoringModel):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            schedule = LRSchedule("cosine", unit="samples", decay_steps=decay_steps, warmup_steps=6)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule.build(optimizer, self.trainer), "interval": "step"},
            }

        def train_dataloader(self):
            rows = torch.ones(200, 32)
            batches = RampUpBatches(DistributedSampler(rows, 1, 0, shuffle=False), 8, rule)
            return DataLoader(rows, batch_sampler=batches)

        def on_train_batch_start(self, batch, batch_idx):
            seen.append((len(batch), self.trainer.optimizers[0].param_groups[0]["lr"]))

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 6}
    run = Trainer(
        accelerator="cpu", devices=1, strategy=MegatronStrategy(), use_distributed_sampler=False, limit_val_batches=0,
        accumulate_grad_batches=accumulated, **options,
    )  # fmt: skip
    run.fit(Module())
    horizon = decay_steps or rule.consumed(6 * accumulated, 8)
    theirs = LRSchedule("cosine", warmup_steps=6).megatron_scheduler(1.0, horizon)
    sizes = [2, 2, 2, 2, 4, 4, 6] + [8] * 20
    assert [size for size, _ in seen] == sizes[: len(seen)]
    for number, (_, rate) in enumerate(seen):
        theirs.num_steps = sum(sizes[: number - number % accumulated])
        assert rate == pytest.approx(theirs.get_lr({"max_lr": 1.0, "min_lr": 0.0})), number


@pytest.mark.parametrize(
    ("rule", "full", "replicas", "message"),
    [
        ((4, 3, 10), 8, 1, "global batch of 7 or 10"),
        ((3, 3, 10), 6, 2, "start=3. does not divide by the 2"),
        ((0, 3, 10), 6, 2, "start=0. must be at least 1"),
    ],
)
def test_rules_that_lead_nowhere_are_refused(rule, full, replicas, message):
    with pytest.raises(ValueError, match=message):
        RampUp(*rule).check(full, replicas)
