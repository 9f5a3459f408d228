"""The same training under vanilla Lightning and under the strategy, and all that Lightning shows of it."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.layout import Layout
from tests.support.trainer import QUIET

CONFIG = plain_gpt.replace(plain_gpt.GPT2, num_layers=4, hidden_size=16)
ROWS, BATCHES, VAL_ROWS = 4, 5, 10  # of a global batch; of an epoch; of the validation set: two batches and a half

HOOKS = [name for name in dir(Callback) if name.startswith("on_")] + ["setup", "teardown", "state_dict"]
MODULE_HOOKS = [name for name in dir(LightningModule) if name.startswith("on_")] + [
    "setup",
    "teardown",
    "prepare_data",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
    "lr_scheduler_step",
    "transfer_batch_to_device",
]
# What is called with names of its own: `on_gpu...` are gone, and these are properties.
_NOT_HOOKS = {"on_gpu", "on_last_stage"}


def seen_by(kind: type, names: list[str]) -> type:
    """A subclass of ``kind`` whose ``hooks`` lists the calls of ``names``."""

    def listed(name: str) -> Any:
        @functools.wraps(getattr(kind, name))
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.__dict__.setdefault("hooks", []).append(name)
            return getattr(super(made, self), name)(*args, **kwargs)

        return hook

    made = type(kind)(kind.__name__, (kind,), {n: listed(n) for n in names if n not in _NOT_HOOKS})
    return made


class VanillaGPT(pl.LightningModule):
    """``plain_gpt`` as a LightningModule that logs as the adapters do."""

    def __init__(self) -> None:
        super().__init__()
        weights = plain_gpt.initial_weights(CONFIG)
        self.names = list(weights)
        self.weights = torch.nn.ParameterList([w.clone() for w in weights.values()])

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        logits = plain_gpt.logits(CONFIG, dict(zip(self.names, self.weights, strict=True)), batch["tokens"])
        each = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        return (each * batch["loss_mask"]).sum() / batch["loss_mask"].sum(), batch["loss_mask"].sum()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, tokens = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=tokens)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss, tokens = self.loss(batch)
        self.log("val_loss", loss, prog_bar=True, batch_size=tokens)

    def configure_optimizers(self) -> Any:
        return scheduled(self.parameters())


class OurGPT(LoadedGPT):
    def configure_optimizers(self) -> Any:
        return scheduled(self.parameters())


def scheduled(parameters: Any) -> Any:
    optimizer = torch.optim.AdamW(parameters, **plain_gpt.ADAM)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]


class Rates(Callback):
    """Learning rates by step, and the losses that `train_loss` showed."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


# name: Trainer arguments, and callbacks
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "max_steps": ({"max_steps": 7}, None),
    "max_epochs": ({"max_epochs": 2, "min_epochs": 1}, None),
    "min_steps": ({"max_epochs": 3, "min_steps": 6}, lambda: [EarlyStopping("val_loss", stopping_threshold=100.0)]),
    "max_time": ({"max_epochs": 2, "max_time": "00:01:00:00"}, lambda: [Timer("00:02:00:00")]),
    "accumulate": ({"max_epochs": 2, "accumulate_grad_batches": 2}, None),
    "accumulation schedule": ({"max_epochs": 2}, lambda: [GradientAccumulationScheduler({0: 1, 1: 3})]),
    "val every 2 batches": ({"max_epochs": 2, "val_check_interval": 2}, None),
    "val every half epoch": ({"max_epochs": 1, "val_check_interval": 0.4}, None),
    "val every 2 epochs": ({"max_epochs": 3, "check_val_every_n_epoch": 2}, None),
    "val over epochs": ({"max_epochs": 2, "val_check_interval": 7, "check_val_every_n_epoch": None}, None),
    "limits as fractions": ({"max_epochs": 1, "limit_train_batches": 0.6, "limit_val_batches": 0.5}, None),
    "limits as counts": ({"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1}, None),
    "overfit": ({"max_epochs": 2, "overfit_batches": 2}, None),
    "fast_dev_run": ({"fast_dev_run": 2}, None),
    "sanity": ({"max_steps": 1, "num_sanity_val_steps": 2}, None),
    "sanity over all": ({"max_steps": 1, "num_sanity_val_steps": -1}, None),
    "clipping": ({"max_steps": 3, "gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm"}, None),
    "profiler": ({"max_steps": 2, "profiler": "simple", "enable_autolog_hparams": False}, None),
    "no inference mode": ({"max_epochs": 1, "inference_mode": False, "benchmark": True}, None),
    "anomaly": ({"max_steps": 2, "detect_anomaly": True}, None),
    "reload": ({"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}, None),
    "deterministic": ({"max_steps": 2, "deterministic": "warn", "benchmark": False}, None),
    "early stopping": (
        {"max_epochs": 4},
        lambda: [EarlyStopping("val_loss", patience=1, min_delta=10.0), ModelCheckpoint(monitor="val_loss")],
    ),
    "barebones": ({"max_steps": 2, "barebones": True}, None),
    "no validation": ({"max_epochs": 1, "limit_val_batches": 0}, None),
}


def run(case: str, layout: Layout | None) -> dict[str, Any]:
    """Train by ``CASES[case]``: under the strategy in ``layout``, or under vanilla Lightning where it is None."""
    options, callbacks = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        module, watch, rates = _module(layout), seen_by(Callback, HOOKS)(), Rates()
        settings: dict[str, Any] = {"num_sanity_val_steps": 0, "log_every_n_steps": 2, **options}
        bare = settings.get("barebones")
        if bare:
            settings = {"max_steps": 2, "barebones": True}
        else:
            settings["callbacks"] = [watch, rates, *(callbacks() if callbacks else [])]
            settings["logger"] = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
            settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
            settings.setdefault("enable_checkpointing", case == "early stopping")
        strategy = layout.strategy() if layout else "auto"
        trainer = Trainer(accelerator="cpu", devices=layout.world_size if layout else 1, strategy=strategy, **settings)
        trainer.fit(module, _loader("train", layout, trainer), _loader("val", layout, trainer))
        csv = Path(folder) / "metrics.csv"
        return {
            "callback hooks": watch.__dict__.get("hooks", []),
            "module hooks": module.__dict__.get("hooks", []),
            "global_step": trainer.global_step,
            "current_epoch": trainer.current_epoch,
            "progress": _progress(trainer),
            "rates": rates.rates,
            "losses": rates.losses,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "csv": csv.read_text() if csv.exists() and trainer.is_global_zero else "",
            "estimated": trainer.estimated_stepping_batches,
            "training": module.training,
        }


def _module(layout: Layout | None) -> Any:
    if layout is None:
        return seen_by(VanillaGPT, MODULE_HOOKS)()
    return seen_by(OurGPT, MODULE_HOOKS)(CONFIG)


def _loader(kind: str, layout: Layout | None, trainer: Trainer) -> DataLoader:
    replicas = layout.dp if layout else 1
    if kind == "val":  # Lightning's own sampler shares these out
        samples = Rows(text_samples(CONFIG, VAL_ROWS))
        return DataLoader(samples, batch_size=ROWS // replicas)
    uniform = text_samples(CONFIG, ROWS * BATCHES)
    uniform["loss_mask"].fill_(1)  # vanilla Lightning's accumulation is a mean of means: here the same
    samples = Rows(uniform)
    sampler: Any = SequentialSampler(samples)
    if layout is not None:
        rank = trainer.strategy.data_parallel_rank  # type: ignore[attr-defined]
        sampler = DistributedSampler(samples, num_replicas=replicas, rank=rank, shuffle=False)
    return DataLoader(samples, batch_size=ROWS // replicas, sampler=sampler)


def _progress(trainer: Trainer) -> dict[str, Any]:
    states = trainer.fit_loop.state_dict()
    return {name: value for name, value in states.items() if "combined_loader" not in str(name)}


def run_all(layout: Layout | None) -> dict[str, dict[str, Any]]:
    """Every case, one after the other, in this process."""
    return {case: run(case, layout) for case in CASES}


def trainer_of(layout: Layout | None, folder: str, **options: Any) -> Trainer:
    settings = {**QUIET, "default_root_dir": folder, "num_sanity_val_steps": 0, "max_steps": 4, **options}
    strategy: Any = layout.strategy() if layout else "auto"
    return Trainer(accelerator="cpu", devices=layout.world_size if layout else 1, strategy=strategy, **settings)
