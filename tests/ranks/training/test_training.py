"""What a Trainer with MegatronStrategy promises beyond the layouts: precision, tails, checkpoints, plain modules."""

import functools

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from lightning_megatron import GPTModule
from tests.reference import parallel_gpt, plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.layout import Layout
from tests.support.plain_module import PlainModule
from tests.support.ranks import run_in_pool
from tests.support.trainer import QUIET, trainer


@functools.cache
def _trained(layout: Layout, precision: str) -> list[dict]:
    train = functools.partial(parallel_gpt.train, **({"loss_scale": 256.0} if precision == "16-mixed" else {}))
    return run_in_pool(layout.world_size, train, plain_gpt.GPT2, layout, 8, 50, 0.5, 1, precision)


# The band: bf16 keeps 8 bits of mantissa, so a loss near 4 moves by some 0.02; fifty steps may add up to twice that.
# fp16 starts at a loss scale that fits: a skipped step would set it one batch behind.
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("layout", [Layout(tp=2, dp=2, sp=True), Layout(pp=2, vp=2)], ids=str)
def test_low_precision_tracks_fp32(layout, precision):
    exact = _trained(layout, "32-true")[0]["losses"]
    for rank in _trained(layout, precision):
        assert rank["steps"] == 50
        assert rank["losses"][:50] == pytest.approx(exact, abs=0.05)
        assert rank["losses"] != exact


def _overflow(scale: float) -> dict:
    layout, watch = Layout(tp=2), parallel_gpt.Watch()
    run = trainer(layout, None, "16-mixed", scale, max_steps=3, gradient_clip_val=0.5, callbacks=[watch])

    class Scheduled(LoadedGPT):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]

    run.fit(Scheduled(plain_gpt.GPT2), DataLoader(Rows(text_samples(plain_gpt.GPT2, 200)), batch_size=4))
    optimizer = run.strategy.optimizers[0]
    return {
        "skipped": optimizer.skipped_steps,
        "logged": float(run.callback_metrics["skipped_steps"]),
        "steps": run.global_step,
        "batches": len(watch.losses),
        "lr": optimizer.param_groups[0]["lr"],
    }


def test_skipped_fp16_steps_move_neither_schedule_nor_global_step():
    for seen in run_in_pool(2, _overflow, 2.0**40):
        assert seen["skipped"] > 0
        assert seen["logged"] == seen["skipped"]
        assert seen["steps"] == 3
        assert seen["batches"] == 3 + seen["skipped"]
        assert seen["lr"] == pytest.approx(plain_gpt.ADAM["lr"] * 0.1**3)


def _evaluate(layout: Layout, rows: int) -> dict:
    run = trainer(layout)
    module = LoadedGPT(plain_gpt.GPT2)
    samples = text_samples(plain_gpt.GPT2, rows)
    loss = run.validate(module, DataLoader(Rows(samples), batch_size=8), verbose=False)[0]["val_loss"]
    logits = torch.cat(run.predict(module, DataLoader(Rows(samples), batch_size=8)))
    return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sp=True), Layout(pp=2, vp=2), Layout(tp=2, pp=2)], ids=str)
def test_validation_and_predictions_with_a_ragged_tail(layout):
    rows = 19  # two batches of 8 and a tail of 3, which interleaving fills up with a padding micro-batch
    samples = text_samples(plain_gpt.GPT2, rows)
    logits = plain_gpt.logits(plain_gpt.GPT2, plain_gpt.initial_weights(plain_gpt.GPT2), samples["tokens"])
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), samples["labels"], reduction="none")
    loss = (each * samples["loss_mask"]).sum() / samples["loss_mask"].sum()
    for seen in run_in_pool(layout.world_size, _evaluate, layout, rows):
        assert seen["loss"] == pytest.approx(float(loss), rel=1e-5)
        torch.testing.assert_close(seen["logits"], logits, rtol=1e-4, atol=1e-5)


def _resume(layout: Layout, folder: str) -> dict:
    data = DataLoader(Rows(text_samples(plain_gpt.GPT2, 18)), batch_size=6)  # an epoch of three batches
    whole = LoadedGPT(plain_gpt.GPT2)
    trainer(layout, max_epochs=2, use_distributed_sampler=False).fit(whole, data)
    first = trainer(layout, max_epochs=1, use_distributed_sampler=False)
    first.fit(LoadedGPT(plain_gpt.GPT2), data)
    first.save_checkpoint(f"{folder}/three.ckpt")
    resumed = LoadedGPT(plain_gpt.GPT2)
    second = trainer(layout, max_epochs=2, use_distributed_sampler=False)
    second.fit(resumed, data, ckpt_path=f"{folder}/three.ckpt")
    pairs = list(zip(whole.parameters(), resumed.parameters(), strict=True))
    return {"equal": all(torch.equal(a, b) for a, b in pairs), "steps": second.global_step}


def test_resume_in_the_same_layout_is_exact(tmp_path):
    for seen in run_in_pool(4, _resume, Layout(tp=2, pp=2), str(tmp_path)):
        assert seen == {"equal": True, "steps": 6}


def _plain(strategy: str, optimizer, precision: str) -> tuple[list, dict]:
    torch.manual_seed(5)
    rows = Rows({"x": torch.randn(40, 4), "y": torch.randn(40, 1)})
    module = PlainModule()
    module.optimizer = optimizer
    options = {"max_epochs": 2, "use_distributed_sampler": False, "callbacks": [LearningRateMonitor()]}
    options["logger"] = DummyLogger()
    if strategy == "megatron":
        run = trainer(Layout(), {"num_microbatches": 2}, precision, **options)
    else:
        run = Trainer(accelerator="cpu", devices=1, precision=precision, **{**QUIET, **options})
    run.fit(module, DataLoader(rows, batch_size=8), DataLoader(rows, batch_size=16))
    return [parameter.detach() for parameter in module.parameters()], run.callback_metrics


def _adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05)


def _adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05, weight_decay=0.1)


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [(_adamw, "32-true"), (_adam, "32-true"), (_sgd, "32-true"), (_sgd, "bf16-mixed"), (_adamw, "bf16-mixed")],
)
def test_a_plain_module_trains_as_under_lightning_alone(optimizer, precision):
    ours, our_metrics = run_in_pool(1, _plain, "megatron", optimizer, precision)[0]
    theirs, their_metrics = run_in_pool(1, _plain, "auto", optimizer, precision)[0]
    # Micro-batches are summed in fp32 here, and in bf16 (3 digits) inside vanilla's one big product under autocast.
    exactness = {"rtol": 1e-4, "atol": 1e-6} if precision == "32-true" else {"rtol": 2e-2, "atol": 2e-3}
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, **exactness)
    assert their_metrics.keys() == our_metrics.keys()
    for name, reference in their_metrics.items():
        torch.testing.assert_close(our_metrics[name], reference, **exactness)


class Shorthand(PlainModule):
    """Its hooks take the batch alone."""

    def training_step(self, batch):
        return super().training_step(batch, 0)

    def validation_step(self, batch):
        return super().validation_step(batch, 0)

    def predict_step(self, batch):
        return self.layers(batch["x"])

    optimizer = staticmethod(lambda parameters: torch.optim.SGD(parameters, lr=0.05))


class ShorthandGPT(LoadedGPT):
    def training_step(self, batch):
        return super().training_step(batch, 0)

    def validation_step(self, batch):
        return super().validation_step(batch, 0)


def _shorthand(layout: Layout | None) -> dict:
    torch.manual_seed(5)
    plain = DataLoader(Rows({"x": torch.randn(7, 4), "y": torch.randn(7, 1)}), batch_size=4)
    options = {"max_epochs": 1, "use_distributed_sampler": False}
    run = trainer(layout, **options) if layout else Trainer(accelerator="cpu", devices=1, **QUIET, **options)
    module = Shorthand()
    run.fit(module, plain, plain)
    seen = {name: float(value) for name, value in run.callback_metrics.items() if name != "grad_norm"}
    seen["predicted"] = torch.cat(run.predict(module, plain)).sum().item()
    if layout:
        run = trainer(layout, max_epochs=1)
        data = DataLoader(Rows(text_samples(plain_gpt.GPT2, 7)), batch_size=2)
        run.fit(ShorthandGPT(plain_gpt.GPT2), data, data)
        assert {"train_loss", "val_loss"} <= run.callback_metrics.keys()
    return seen


def test_hooks_may_leave_the_batchs_number_out():
    expected = run_in_pool(1, _shorthand, None)[0]
    for seen in run_in_pool(2, _shorthand, Layout(dp=2)):
        assert seen == pytest.approx(expected, rel=1e-4)


def _transformers_batch(layout: Layout) -> float:
    module = LoadedGPT(plain_gpt.GPT2)
    tokens = text_samples(plain_gpt.GPT2, 4)["tokens"][:, :13]
    labels = tokens.clone()
    labels[:, :5] = -100
    attention = torch.ones_like(tokens)
    attention[0, 9:] = 0
    labels[0, 9:] = -100
    rows = Rows({"input_ids": tokens, "labels": labels, "attention_mask": attention})
    return trainer(layout).validate(module, DataLoader(rows, batch_size=4), verbose=False)[0]["val_loss"]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sp=True), Layout(pp=2)], ids=str)
def test_batches_as_transformers_collators_make_them(layout):
    tokens = text_samples(plain_gpt.GPT2, 4)["tokens"][:, :13]
    labels = tokens.clone()
    labels[:, :5] = -100
    labels[0, 9:] = -100
    logits = plain_gpt.logits(plain_gpt.GPT2, plain_gpt.initial_weights(plain_gpt.GPT2), tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    for seen in run_in_pool(layout.world_size, _transformers_batch, layout):
        assert seen == pytest.approx(float(loss), rel=1e-5)


def _two_fits_and_two_layouts() -> list[float]:
    data = DataLoader(Rows(text_samples(plain_gpt.GPT2, 24)), batch_size=4)
    losses = []
    for layout in (Layout(tp=2), Layout(dp=2), Layout(pp=2)):
        module, run = LoadedGPT(plain_gpt.GPT2), trainer(layout, max_steps=2)
        run.fit(module, data)
        run.fit_loop.epoch_loop.max_steps = 4
        run.fit(module, data)
        losses.append(float(run.callback_metrics["train_loss"]))
        assert run.global_step == 4
    return losses


def test_a_second_fit_and_other_sizes_in_the_same_process():
    ranks = run_in_pool(2, _two_fits_and_two_layouts)
    assert ranks[0] == ranks[1]
    assert all(1 < loss < 5 for loss in ranks[0])


def test_the_adapter_needs_the_strategy():
    with pytest.raises(RuntimeError, match="strategy=MegatronStrategy"):
        Trainer(accelerator="cpu", devices=1, **QUIET).fit(
            GPTModule(plain_gpt.GPT2), DataLoader(Rows(text_samples(plain_gpt.GPT2, 4)))
        )
