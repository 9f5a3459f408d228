"""At a resume an optimizer's and its schedules' settings are the checkpoint's, or the program's if it is asked for."""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader

from lightning_megatron import Checkpointing, GPTModule, LRSchedule
from lightning_megatron.training.lr_scheduler import MegatronLRScheduler
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.plain_module import PlainModule
from tests.support.ranks import RankError, run_ranks
from tests.support.scheduled_gpt import CONFIG, Scheduled, adam, loaders
from tests.support.trainer import QUIET, trainer

STOP, STEPS = 3, 7
WAS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
NOW = {"lr": 2e-2, "weight_decay": 0.5, "betas": (0.8, 0.9), "eps": 1e-6}


def adamw(parameters, lr, weight_decay, **others):
    """Two groups: the second at half the rate, without weight decay."""
    p = list(parameters)
    groups = [{"params": p[0::2]}, {"params": p[1::2], "lr": lr / 2, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, **others)


def sgd(parameters, lr, weight_decay, betas, eps):
    return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay, momentum=betas[0], nesterov=eps > 1e-7)


def sequential(optimizer, gamma):
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=2), ExponentialLR(optimizer, gamma)], [2])


# An optimizer, and its schedule in the checkpoint's run and in the program's.
CASES: dict[str, Any] = {
    "adamw": (adamw, None, None),
    "sgd": (sgd, None, None),
    "megatron": (adamw, LRSchedule("linear", decay_steps=20), LRSchedule("linear", decay_steps=10, min_lr=1e-3)),
    "step": (adamw, lambda o: StepLR(o, 2, 0.5), lambda o: StepLR(o, 2, 0.9)),
    "milestones": (adamw, lambda o: MultiStepLR(o, [2, 5], 0.5), lambda o: MultiStepLR(o, [1, 4], 0.5)),
    "one cycle": (
        adamw, lambda o: OneCycleLR(o, 1e-2, 20), lambda o: OneCycleLR(o, 1e-2, 20, pct_start=0.5)
    ),
    "cycles": (sgd, lambda o: CyclicLR(o, 1e-3, 1e-2, 4), lambda o: CyclicLR(o, 1e-3, 2e-2, 6)),
    "restarts": (
        adamw, lambda o: CosineAnnealingWarmRestarts(o, 3), lambda o: CosineAnnealingWarmRestarts(o, 4, eta_min=1e-4)
    ),
    "sequential": (adamw, lambda o: sequential(o, 0.8), lambda o: sequential(o, 0.9)),
    "another kind": (adamw, lambda o: StepLR(o, 2, 0.5), LRSchedule("linear", decay_steps=10)),
    "lambda behind megatron": (
        adamw, LRSchedule("linear", decay_steps=20), lambda o: LambdaLR(o, lambda step: 1 / (1 + step))
    ),
    "none any more": (adamw, LRSchedule("linear", decay_steps=20), None),
}  # fmt: skip


class Groups(Callback):
    """Each group's settings at the start of every batch."""

    def __init__(self) -> None:
        self.seen: list[list[dict[str, Any]]] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        names = ("lr", "weight_decay", "betas", "eps", "momentum", "nesterov")
        groups = trainer.optimizers[0].param_groups
        self.seen.append([{name: group[name] for name in names if name in group} for group in groups])


def _fit(module, data, layout, steps, load=None, save=None, **strategy) -> dict[str, Any]:
    watch = Groups()
    limit = {"max_epochs": -steps} if steps < 0 else {"max_steps": steps}
    options = {**limit, "callbacks": [watch], "use_distributed_sampler": False}
    if layout is None:
        run = Trainer(accelerator="cpu", devices=1, **{**QUIET, **options})
    else:
        run = trainer(layout, strategy, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, data, ckpt_path=load, weights_only=False)
    if save:
        run.save_checkpoint(save)
    told = [str(w.message) for w in caught if "settings differ" in str(w.message)]
    weights = [p.detach().clone() for p in module.parameters()]
    return {"groups": watch.seen, "weights": weights, "told": told}


def _rate_of(runs: dict[str, Any], which: str) -> list[float]:
    return [groups[0]["lr"] for groups in runs[which]["groups"]]


def _gpt(case: str, side: str) -> Any:
    make, was, now = CASES[case]
    settings, schedule = (WAS, was) if side == "was" else (NOW, now)
    return Scheduled(CONFIG, optimizer=lambda p: make(p, **settings), lr_schedule=schedule)


def _resume(layout: Layout, cases: list[str], folder: str) -> dict[str, Any]:
    found = {}
    for case in cases:
        data, path = DataLoader(Rows(text_samples(CONFIG, 4 * STEPS)), batch_size=4), f"{folder}/{case}.ckpt"
        whole = _fit(_gpt(case, "was"), data, layout, STEPS)
        _fit(_gpt(case, "was"), data, layout, STOP, save=path)
        same = _fit(_gpt(case, "was"), data, layout, STEPS, path)
        held = _fit(_gpt(case, "now"), data, layout, STEPS, path)
        other = _fit(
            _gpt(case, "now"), data, layout, STEPS, path, checkpointing=Checkpointing(optimizer_settings="program")
        )
        new = _fit(_gpt(case, "now"), data, layout, STEPS)
        found[case] = {"whole": whole, "same": same, "held": held, "other": other, "new": new}
    return found


@cache
def resumed(folder: str) -> dict[str, Any]:
    return run_ranks(1, _resume, Layout(), list(CASES), folder)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("settings"))


def test_what_has_not_changed_is_not_talked_of(folder):
    for case, runs in resumed(folder).items():
        assert runs["same"]["told"] == runs["new"]["told"] == [], case
        assert runs["same"]["groups"] == runs["whole"]["groups"][STOP:], case


TORCHS = ["step", "milestones", "one cycle", "cycles", "restarts"]


@pytest.mark.parametrize("case", ["adamw", "sgd", "megatron", "sequential", *TORCHS])
def test_the_checkpoints_settings_hold(case, folder):
    runs = resumed(folder)[case]
    assert runs["held"]["groups"] == runs["whole"]["groups"][STOP:]
    assert all(map(torch.equal, runs["held"]["weights"], runs["whole"]["weights"]))


@pytest.mark.parametrize("case", ["adamw", "sgd", "megatron", *TORCHS])
def test_if_asked_the_programs_settings_hold(case, folder):
    """Exactly those that a run with them from the start has at the same steps; its weights are others, of course."""
    runs = resumed(folder)[case]
    for seen, expected in zip(runs["other"]["groups"], runs["new"]["groups"][STOP:], strict=True):
        for group, other in zip(seen, expected, strict=True):
            lr = pytest.approx(other["lr"], rel=1e-12)  # StepLR multiplies, its formula raises to a power
            assert group == {**other, "lr": lr}


def test_the_last_of_several_schedules_goes_on_with_the_programs_factor_at_the_ratio_of_the_peaks(folder):
    runs = resumed(folder)["sequential"]
    rates = _rate_of(runs, "other")
    before = runs["whole"]["groups"][STOP][0]["lr"]
    assert rates == pytest.approx([2 * before * 0.9**step for step in range(STEPS - STOP)])


def test_both_values_are_said(folder):
    (told,) = resumed(folder)["megatron"]["held"]["told"]
    for text in (
        "lr of group 0: 0.01 in the checkpoint, 0.02 in the program",
        "lr of group 1: 0.005 in the checkpoint, 0.01 in the program",
        "weight_decay of group 0: 0.1 in the checkpoint, 0.5 in the program",
        "betas of group 1: (0.9, 0.95) in the checkpoint, (0.8, 0.9) in the program",
        "eps of group 0: 1e-08 in the checkpoint, 1e-06 in the program",
        "MegatronLRScheduler's decay_steps: 20 in the checkpoint, 10 in the program",
        "MegatronLRScheduler's min_lr: 0.0 in the checkpoint, 0.001 in the program",
        "Checkpointing(optimizer_settings='program')) takes the program's.",
    ):
        assert text in told
    assert "weight_decay of group 1" not in told
    (told,) = resumed(folder)["sequential"]["other"]["told"]
    assert "SequentialLR's gamma of schedule 1: 0.8 in the checkpoint, 0.9 in the program" in told
    assert "The program's hold; MegatronStrategy(checkpointing=Checkpointing(optimizer_settings='checkpoint'))" in told
    (told,) = resumed(folder)["sgd"]["held"]["told"]
    assert "momentum: 0.9 in the checkpoint, 0.8 in the program" in told
    (told,) = resumed(folder)["milestones"]["held"]["told"]
    assert "MultiStepLR's milestones: [2, 5] in the checkpoint, [1, 4] in the program" in told
    (told,) = resumed(folder)["one cycle"]["held"]["told"]
    assert "OneCycleLR's ends of phases: [5.0, 19] in the checkpoint, [9.0, 19] in the program" in told


def test_another_kind_of_schedule_goes_on_at_the_same_place(folder):
    runs = resumed(folder)["another kind"]
    (told,) = runs["held"]["told"]
    assert (
        "MegatronLRScheduler is another kind of scheduler than the checkpoint's: it continues at the same step" in told
    )
    rates = _rate_of(runs, "held")
    assert rates == pytest.approx([1e-2 * (1 - step / 10) for step in range(STOP, STEPS)])  # the checkpoint's peak
    rates = _rate_of(resumed(folder)["lambda behind megatron"], "other")
    assert rates == pytest.approx([2e-2 / (1 + step) for step in range(STOP, STEPS)])


def test_a_schedule_that_is_gone_is_said(folder):
    runs = resumed(folder)["none any more"]
    (told,) = runs["held"]["told"]
    assert "The checkpoint has 1 schedulers, and the program has 0." in told
    assert set(_rate_of(runs, "held")) == {runs["whole"]["groups"][STOP][0]["lr"]}
    assert set(_rate_of(runs, "other")) == {2e-2}


class LayerWise(Scheduled):
    """Groups by layer, of which each pipeline stage has its own."""

    def configure_optimizers(self):
        found: dict[str, list] = {}
        for name, parameter in self.named_parameters():
            found.setdefault(name.partition("layers.")[2][:1], []).append(parameter)
        rates = {"": 1e-2, "0": 3e-3, "1": 1e-3}
        return torch.optim.AdamW([{"params": p, "lr": rates[layer]} for layer, p in found.items()])


def _by_stage(path: str) -> tuple[Any, Any]:
    data = DataLoader(Rows(text_samples(CONFIG, 4 * STEPS)), batch_size=4)
    whole = _fit(LayerWise(CONFIG), data, Layout(pp=2), STEPS)
    _fit(LayerWise(CONFIG), data, Layout(pp=2), STOP, save=path)
    return whole, _fit(LayerWise(CONFIG), data, Layout(pp=2), STEPS, path)


def test_each_stage_has_its_own_groups_back(tmp_path):
    path = f"{tmp_path}/stages.ckpt"
    rates = []
    for whole, resumed in run_ranks(2, _by_stage, path):
        assert resumed["groups"] == whole["groups"][STOP:]
        assert all(map(torch.equal, resumed["weights"], whole["weights"]))
        assert resumed["told"] == []
        rates.append(sorted(group["lr"] for group in resumed["groups"][0]))
    assert rates == [[3e-3, 1e-2], [1e-3, 1e-2]]


class Plain(PlainModule):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings

    def configure_optimizers(self):
        optimizer = adamw(self.parameters(), **self.settings)
        return [optimizer], [{"scheduler": StepLR(optimizer, 2, 0.5), "interval": "step"}]


def _plain(layout: Layout | None, folder: str) -> dict[str, Any]:
    x = torch.randn(4 * STOP, 4, generator=torch.Generator().manual_seed(5))
    data, path = DataLoader(Rows({"x": x, "y": x[:, :1]}), batch_size=4), f"{folder}/{layout}.ckpt"
    _fit(Plain(WAS), data, layout, -1, save=path)
    return _fit(Plain(NOW), data, layout, -2, path)


def test_the_rule_is_vanilla_lightnings(folder):
    """Of a plain module: the same settings, and the same weights within what sums over replicas round."""
    (vanilla,) = run_ranks(1, _plain, None, folder)
    for layout in (Layout(dp=2), Layout(dp=2, sharded=False)):
        for ours in run_ranks(2, _plain, layout, folder):  # both replicas see all rows
            assert ours["groups"] == vanilla["groups"]
            for mine, theirs in zip(ours["weights"], vanilla["weights"], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def _amsgrad(path: str) -> None:
    data = DataLoader(Rows(text_samples(CONFIG, 12)), batch_size=4)
    for steps, amsgrad in ((1, False), (2, True)):
        module = GPTModule(CONFIG, optimizer=lambda p, on=amsgrad: torch.optim.AdamW(p, amsgrad=on))
        load, save = (path, None) if amsgrad else (None, path)
        _fit(module, data, Layout(), steps, load, save, checkpointing=Checkpointing(optimizer_settings="program"))


def test_a_setting_without_its_state_is_refused(tmp_path):
    with pytest.raises(RankError, match="amsgrad=True: the checkpoint was trained without"):
        run_ranks(1, _amsgrad, f"{tmp_path}/without.ckpt")


def test_states_of_the_first_versions_are_understood():
    """They have neither peaks nor what the settings were at the start: those are the groups' own."""
    p = torch.nn.Parameter(torch.ones(2))
    before, now = torch.optim.AdamW([p], lr=1e-2), torch.optim.AdamW([p], lr=4e-2)
    scheduler = LRSchedule("linear", decay_steps=10, min_lr=1e-3).build(before)
    before.step()
    scheduler.step()
    state = {k: v for k, v in scheduler.state_dict().items() if k not in ("base_lrs", "max_lr", "horizon")}
    resumed = LRSchedule("cosine", decay_steps=5).build(now)
    assert isinstance(resumed, MegatronLRScheduler)
    now.load_state_dict(before.state_dict())
    resumed.load_state_dict(state)
    for optimizer, schedule in ((before, scheduler), (now, resumed)):
        optimizer.step()
        schedule.step()
    assert now.param_groups[0]["lr"] == before.param_groups[0]["lr"] == pytest.approx(1e-2 - 2 * 9e-4)


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def _per_epoch(optimizer):
    return ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, factor=0.5)  # lower from each update to the next


def _per_step(optimizer):
    plateau = ReduceLROnPlateau(optimizer, patience=1, threshold=10.0, factor=0.5)
    return {"scheduler": plateau, "monitor": "train_loss", "interval": "step"}


# An epoch has five batches and ends with a validation.
PLATEAUS: dict[str, Any] = {
    "behind the validation": (_per_epoch, {}, {}),
    "at the epoch's end": (_per_epoch, {"save_on_train_epoch_end": True}, {}),
    "within the epoch": (_per_epoch, {"every_n_train_steps": 3}, {}),
    "validations within the epoch": (_per_epoch, {}, {"val_check_interval": 3}),
    "per step": (_per_step, {"every_n_train_steps": 3}, {}),
}  # fmt: skip


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step=").partition("-")[0])


def _plateaus(folder: str) -> dict[str, Any]:
    found = {}
    for name, (schedule, keep, options) in PLATEAUS.items():
        rates = []
        made: list[Path] = []  # by the first run
        for load in (None, 1, -2):
            watch, saves = Rates(), ModelCheckpoint(f"{folder}/{name}", "{step}", save_top_k=-1, **keep)
            run = trainer(Layout(), max_epochs=3, callbacks=[watch, saves], enable_checkpointing=True, **options)
            module = Scheduled(CONFIG, optimizer=adam, lr_schedule=schedule)
            run.fit(module, *loaders(1, 0), ckpt_path=load and made[load], weights_only=False)
            made = made or sorted(
                Path(f"{folder}/{name}").iterdir(), key=lambda p: int(p.stem.split("=")[1].split("-")[0])
            )
            rates.append((run.global_step - len(watch.seen), watch.seen))
        found[name] = rates
    return found


def test_reduce_on_plateau_misses_no_update(tmp_path):
    for name, ((_, whole), *resumed) in run_ranks(1, _plateaus, str(tmp_path))[0].items():
        assert len(set(whole)) > 2, name
        for start, rates in resumed:
            assert 0 < start < 15
            assert rates == whole[start:], name


def _too_early(folder: str) -> list[str]:
    def fit(load=None):
        saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)  # the last batch
        run = trainer(Layout(), max_epochs=2, callbacks=[saves], enable_checkpointing=True)
        module = Scheduled(CONFIG, optimizer=adam, lr_schedule=_per_epoch)
        run.fit(module, *loaders(1, 0), ckpt_path=load, weights_only=False)

    fit()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(f"{folder}/step=5.ckpt")
    return [str(w.message) for w in caught]


def test_a_save_before_the_validation_that_it_waits_for_is_said(tmp_path):
    told = run_ranks(1, _too_early, str(tmp_path))[0]
    assert any("saved before 'val_loss' was known" in text for text in told)
