"""``LRSchedule`` alone: equal to megatron-core's scheduler at every step, under torch's face; what it refuses."""

import itertools
import re

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.optim.lr_scheduler import LinearLR, SequentialLR

from lightning_megatron import GPTModule, LRSchedule

PEAK, STEPS, BATCH = 3e-3, 60, 7
STYLES = {
    "constant": {},
    "linear": {},
    "cosine": {},
    "inverse-square-root": {},
    "WSD": {"wsd_decay_steps": 12},
    "WSD-linear": {"wsd_decay_steps": 12, "wsd_decay_style": "linear"},
    "WSD-cosine": {"wsd_decay_steps": 12, "wsd_decay_style": "cosine"},
    "WSD-minus_sqrt": {"wsd_decay_steps": 12, "wsd_decay_style": "minus_sqrt"},
}
WARMUPS = [{}, {"warmup_steps": 9, "init_lr": 1e-4}, {"warmup_fraction": 0.15}]
DECAYS = [
    {},
    {"weight_decay_style": "constant", "start_weight_decay": 0.07, "end_weight_decay": 0.07},
    {"weight_decay_style": "linear", "start_weight_decay": 0.01, "end_weight_decay": 0.2},
    {"weight_decay_style": "cosine", "start_weight_decay": 0.0, "end_weight_decay": 0.2, "weight_decay_steps": 30},
]


def torch_optimizer(weight_decay: float = 0.1) -> torch.optim.Optimizer:
    """Three groups: as the optimizer, at half the rate, without weight decay."""
    w = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [{"params": [w[0]]}, {"params": [w[1]], "lr": PEAK / 2}, {"params": [w[2]], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK, weight_decay=weight_decay)


def megatron_scheduler(optimizer, style, warmup, decay, unit: int) -> OptimizerParamScheduler:
    """As Megatron-LM's ``get_optimizer_param_scheduler`` makes it."""
    multiples = ((1.0, 1.0), (0.5, 1.0), (1.0, 0.0))
    for group, (lr, wd) in zip(optimizer.param_groups, multiples, strict=True):
        group.update(max_lr=PEAK * lr, min_lr=1e-4 * lr, wd_mult=wd)
    steps = 45 * unit
    if "warmup_fraction" in warmup:
        warmup_steps = warmup["warmup_fraction"] * steps
    else:
        warmup_steps = warmup.get("warmup_steps", 0) * unit
    return OptimizerParamScheduler(
        optimizer,
        init_lr=warmup.get("init_lr", 0.0),
        max_lr=PEAK,
        min_lr=1e-4,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=style.split("-")[0] if style.startswith("WSD") else style,
        start_wd=decay.get("start_weight_decay", 0.1),
        end_wd=decay.get("end_weight_decay", 0.1),
        wd_incr_steps=decay.get("weight_decay_steps", 45) * unit,
        wd_incr_style=decay.get("weight_decay_style", "constant"),
        wsd_decay_steps=12 * unit,
        lr_wsd_decay_style=STYLES[style].get("wsd_decay_style", "exponential"),
    )


def schedule(style, warmup, decay, unit: int = 1, **changed) -> LRSchedule:
    lengths = {"decay_steps": 45, **STYLES[style], **warmup, **decay}
    scaled = {name: value * unit if name.endswith("_steps") else value for name, value in lengths.items()}
    unit_name = "steps" if unit == 1 else "samples"
    return LRSchedule("WSD" if style.startswith("WSD") else style, min_lr=1e-4, unit=unit_name, **{**scaled, **changed})


def values(optimizer) -> list[tuple[float, float]]:
    return [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


def walk(optimizer, scheduler, steps: int, *increment: int) -> list:
    seen = [values(optimizer)]
    for _ in range(steps):
        optimizer.step()
        scheduler.step(*increment)
        seen.append(values(optimizer))
    return seen


@pytest.mark.parametrize("unit", [1, BATCH], ids=["steps", "samples"])
@pytest.mark.parametrize("style", STYLES)
def test_equals_megatron_at_every_step(style, unit):
    for warmup, decay in itertools.product(WARMUPS, DECAYS):
        theirs = torch_optimizer()
        expected = walk(theirs, megatron_scheduler(theirs, style, warmup, decay, unit), STEPS, unit)
        ours = torch_optimizer()
        made = schedule(style, warmup, decay, unit).build(ours, samples_per_step=BATCH)
        assert walk(ours, made, STEPS) == expected, (warmup, decay)
        assert made.get_last_lr() == [lr for lr, _ in values(ours)]


@pytest.mark.parametrize("style", STYLES)
def test_resumed_it_goes_on_where_it_was(style):
    for warmup, decay in itertools.product(WARMUPS, DECAYS):
        arguments = (style, warmup, decay, BATCH)
        whole = torch_optimizer()
        expected = walk(whole, schedule(*arguments).build(whole, samples_per_step=BATCH), STEPS)
        first = torch_optimizer()
        scheduler = schedule(*arguments).build(first, samples_per_step=BATCH)
        walk(first, scheduler, 20)
        second = torch_optimizer()
        resumed = schedule(*arguments).build(second, samples_per_step=BATCH)
        second.load_state_dict(first.state_dict())
        resumed.load_state_dict(scheduler.state_dict())
        assert walk(second, resumed, STEPS - 20) == expected[20:]


def test_the_state_is_plain_values(tmp_path):
    torch.save(LRSchedule(decay_steps=9).build(torch_optimizer()).state_dict(), tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True)["num_steps"] == 0


def test_a_loaded_state_brings_its_schedule_as_those_of_torchs_schedulers():
    old = LRSchedule("cosine", decay_steps=10).build(torch_optimizer())
    optimizer = torch_optimizer()
    new = LRSchedule("cosine", decay_steps=20).build(optimizer)
    new.load_state_dict(old.state_dict())
    walk(optimizer, new, 10)
    assert optimizer.param_groups[0]["lr"] == 0


def test_inside_torchs_sequential_scheduler():
    optimizer = torch_optimizer()
    decay = DECAYS[2]
    parts = [
        LinearLR(optimizer, start_factor=0.5, total_iters=4),
        schedule("cosine", {}, decay).build(optimizer),
    ]
    seen = walk(optimizer, SequentialLR(optimizer, parts, milestones=[4]), 30)
    alone = torch_optimizer()
    assert seen[4:] == walk(alone, schedule("cosine", {}, decay).build(alone), 26)


def test_a_group_that_learns_slower_keeps_its_ratio():
    optimizer = torch_optimizer()
    scheduler = LRSchedule("cosine", warmup_steps=5, decay_steps=45, min_lr=1e-4).build(optimizer)
    for (whole, _), (half, _), _ in walk(optimizer, scheduler, STEPS):
        assert half == pytest.approx(whole / 2, rel=1e-12)


def run(**options) -> Trainer:
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **options)


class Loader:
    batch_size = 3

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self):
        return iter([torch.ones(3, 32)] * self.batches)


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [({"max_steps": 8}, 8), ({"max_epochs": 4, "accumulate_grad_batches": 2}, 8), ({"max_epochs": 3}, 9)],
    ids=str,
)
@pytest.mark.parametrize("unit", ["steps", "samples"])
def test_without_decay_steps_it_ends_with_the_run(trainer, steps, unit):
    seen = []

    class Module(BoringModel):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            schedule = LRSchedule("linear", unit=unit)
            loaded = self.trainer.train_dataloader is not None
            made = schedule.build(optimizer, self.trainer)
            # Loading here would lose a resumed loader's state (Lightning's issue 20550).
            assert (self.trainer.train_dataloader is not None) == loaded
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}

        def on_train_batch_end(self, *_):
            seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    fit = run(**trainer, enable_progress_bar=False, enable_model_summary=False)
    fit.fit(Module(), Loader(3))
    assert fit.global_step == steps
    expected = [1 - done / steps for done in range(steps + 1)]
    assert sorted(set(seen), reverse=True) == pytest.approx(expected[1:] if len(seen) == steps else expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "exponential"}, "style='exponential' is unknown. Use one of 'constant', 'linear'"),
        ({"unit": "tokens"}, "unit='tokens' is unknown"),
        ({"warmup_steps": 5, "warmup_fraction": 0.1}, "say the same thing twice"),
        ({"warmup_steps": -1}, "warmup_steps=-1 is not a whole number of steps from 0"),
        ({"warmup_steps": 0.1}, "warmup_steps=0.1 is not a whole number"),
        ({"decay_steps": 0}, "decay_steps=0 is not a whole number of steps from 1"),
        ({"warmup_fraction": 1.0}, "warmup_fraction=1.0 is a fraction"),
        ({"warmup_steps": 10, "decay_steps": 10}, "warmup_steps=10 is not below decay_steps=10"),
        ({"min_lr": -1.0}, "min_lr=-1.0 is negative"),
        ({"init_lr": 1e-5}, "init_lr=1e-05 is where the warm-up begins, but there is no warm-up"),
        ({"start_weight_decay": 0.1}, "give both start and end"),
        ({"weight_decay_style": "linear"}, "give both start and end"),
        ({"start_weight_decay": 0.1, "end_weight_decay": 0.2}, "keeps one value"),
        (
            {"weight_decay_style": "cosine", "start_weight_decay": 0.2, "end_weight_decay": 0.1},
            "Use start <= end",
        ),
        ({"weight_decay_steps": 4}, "weight_decay_steps=4 with weight_decay_style='constant'"),
        ({"style": "WSD"}, "Give wsd_decay_steps"),
        ({"wsd_decay_steps": 4}, "they belong to style='WSD'"),
        ({"style": "linear", "wsd_decay_style": "cosine"}, "they belong to style='WSD'"),
        ({"style": "WSD", "warmup_steps": 6, "wsd_decay_steps": 6, "decay_steps": 10}, "decay_steps=12 or more"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LRSchedule(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "decay_steps=None takes the length of the Trainer's run"),
        ({"decay_steps": 5, "unit": "samples"}, "counts the global batch"),
        ({"decay_steps": 5, "min_lr": 0.1}, "must not be above the peak"),
        ({"decay_steps": 5, "warmup_steps": 2, "init_lr": 0.1}, "must not be above the peak"),
    ],
)
def test_what_the_optimizer_cannot_follow_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LRSchedule(**arguments).build(torch_optimizer())


def test_weight_decay_without_a_ratio_is_refused():
    optimizer = torch_optimizer(weight_decay=0.0)
    optimizer.param_groups[1]["weight_decay"] = 0.3
    growing = LRSchedule(decay_steps=5, weight_decay_style="linear", start_weight_decay=0.0, end_weight_decay=0.1)
    with pytest.raises(ValueError, match="cannot keep its ratio"):
        growing.build(optimizer)


def test_a_run_without_an_end_needs_decay_steps():
    with pytest.raises(MisconfigurationException, match="length of this run is not known"):
        LRSchedule().build(torch_optimizer(), run(max_epochs=-1))
    LRSchedule("constant", warmup_steps=3).build(torch_optimizer(), run(max_epochs=-1))


def test_a_yaml_configuration_says_it():
    parser = ArgumentParser()
    parser.add_class_arguments(GPTModule, "module")
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 64, "seq_length": 16}
    groups = {
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002}},
        "no_weight_decay": "lightning_megatron.biases_and_vectors",
    }
    module = {"config": sizes, "optimizer": groups, "lr_schedule": {"style": "cosine", "warmup_steps": 3}}
    made = parser.instantiate(parser.parse_object({"module": module})).module
    assert made.lr_schedule == LRSchedule("cosine", warmup_steps=3)
    layer = torch.nn.Linear(2, 2)
    built = made.optimizer.build(layer.named_parameters()).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in built] == [(0.002, 0.01), (0.002, 0.0)]
