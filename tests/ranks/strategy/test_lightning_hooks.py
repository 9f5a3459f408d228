"""Every hook that a module, a callback or a data module may override, against vanilla Lightning: called in the same
order, and with the same effect. Losses differ by fp32 rounding (see ``test_lightning_loops.py``)."""

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from lightning_megatron import GPTModule
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.lightning_runs import CONFIG, HOOKS, MODULE_HOOKS, OurGPT, VanillaGPT, seen_by
from tests.support.plain_module import PlainModule
from tests.support.ranks import run_ranks
from tests.support.trainer import QUIET, trainer

LAYOUTS = [Layout(pp=2), Layout(tp=2, dp=2)]
ROWS = 4  # of a global batch

MORE_MODULE_HOOKS = [
    "configure_callbacks",
    "configure_model",
    "configure_optimizers",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
]
DATA_HOOKS = [
    *("prepare_data", "setup", "teardown", "train_dataloader", "val_dataloader", "test_dataloader"),
    *("predict_dataloader", "state_dict", "load_state_dict", "on_exception"),
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"),
]


def of_the_user(hyperparameters: Any) -> dict[str, Any]:
    """What the user saved: an adapter keeps its own arguments beside it, for ``load_from_checkpoint``."""
    own = inspect.signature(GPTModule.__init__).parameters
    return {name: value for name, value in dict(hyperparameters).items() if name not in own}


class Counter(Callback):
    """Counts batches, keeps the count in checkpoints, and fails when it is asked to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.batches, self.fail_at, self.errors = 0, fail_at, []
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.outputs: list[float] = []

    @property
    def state_key(self) -> str:
        return "the counter"

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        checkpoint["by the callback"] = self.batches

    def on_load_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        self.loaded = checkpoint["by the callback"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.batches == self.fail_at:
            raise ValueError("as asked")
        self.batches += 1
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        self.outputs.append(float(outputs["loss"]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.errors.append(str(exception))


class Overrides:
    """Overrides of a module, each with an effect on the training or on the checkpoint."""

    def configure_callbacks(self) -> Any:
        self.own = Counter()
        self.own.__class__ = type("Own", (Counter,), {"state_key": "the module's own"})
        return [self.own]

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "tokens": (batch["tokens"] + 1) % CONFIG.vocab_size}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "labels": batch["labels"].flip(1)}

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (self.trainer.global_step + 1)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def lr_scheduler_step(self, scheduler, metric) -> None:
        scheduler.step()
        scheduler.step()

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")

    def on_save_checkpoint(self, checkpoint) -> None:
        checkpoint["by the module"] = self.global_step

    def on_load_checkpoint(self, checkpoint) -> None:
        self.loaded = checkpoint["by the module"]


class VanillaHooked(Overrides, VanillaGPT):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 3})

    def configure_model(self) -> None:
        pass

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        loss, tokens = self.loss(batch)
        self.log("test_loss", loss, batch_size=tokens)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch["tokens"]


class OurHooked(Overrides, OurGPT):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.save_hyperparameters({"width": 3})


class Data(LightningDataModule):
    def __init__(self, layout: Layout | None) -> None:
        super().__init__()
        self.layout = layout
        self.save_hyperparameters({"rows": ROWS})

    def state_dict(self) -> dict[str, Any]:
        return {"kept": 7}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict["kept"]

    def train_dataloader(self) -> DataLoader:
        return self._loader(12, uniform=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(10)

    test_dataloader = predict_dataloader = val_dataloader

    def _loader(self, rows: int, uniform: bool = False) -> DataLoader:
        samples = text_samples(CONFIG, rows)
        if uniform:
            samples["loss_mask"].fill_(1)
        data, replicas = Rows(samples), self.layout.dp if self.layout else 1
        sampler: Any = SequentialSampler(data)
        if uniform and self.layout:
            rank = self.trainer.strategy.data_parallel_rank
            sampler = DistributedSampler(data, num_replicas=replicas, rank=rank, shuffle=False)
        return DataLoader(data, batch_size=ROWS // replicas, sampler=sampler)


class Spy(Logger):
    """What any logger is told."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.folder = folder

    name, version = "spy", 0

    @property
    def save_dir(self) -> str:
        return self.folder

    @rank_zero_only
    def log_metrics(self, metrics, step=None) -> None:
        self.calls.append(("metrics", step, sorted(metrics)))

    @rank_zero_only
    def log_hyperparams(self, params, *_) -> None:
        self.calls.append(("hyperparams", of_the_user(params)))

    @rank_zero_only
    def log_graph(self, model, input_array=None) -> None:
        self.calls.append("graph")

    @rank_zero_only
    def save(self) -> None:
        self.calls.append("save")

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback) -> None:
        self.calls.append(("checkpoint", Path(checkpoint_callback.last_model_path).name))

    @rank_zero_only
    def finalize(self, status) -> None:
        self.calls.append(("finalize", status))


def run(layout: Layout | None, folder: str) -> dict[str, Any]:
    kind = seen_by(OurHooked if layout else VanillaHooked, MODULE_HOOKS + MORE_MODULE_HOOKS)
    spy, listed = Spy(folder), []

    def trained(epochs: int, fail_at: int | None = None, path: str | None = None, **options: Any) -> Any:
        module, data = kind(CONFIG) if layout else kind(), seen_by(Data, DATA_HOOKS)(layout)
        watch = seen_by(Counter, [*HOOKS, "load_state_dict"])(fail_at)
        options = {
            "max_epochs": epochs,
            "callbacks": [watch],
            "log_every_n_steps": 1,
            **options,
        }
        options |= {"num_sanity_val_steps": 0, "limit_test_batches": 2, "limit_predict_batches": 0.4}
        options |= {"default_root_dir": folder}
        strategy: Any = layout.strategy() if layout else "auto"
        world = layout.world_size if layout else 1
        made = Trainer(accelerator="cpu", devices=world, strategy=strategy, **{**QUIET, **options})
        listed.append((watch, module, data))
        made.fit(module, datamodule=data, ckpt_path=path, weights_only=False if path else None)
        return made

    path = f"{folder}/one.ckpt"
    keep = ModelCheckpoint(folder, "kept-{step}", save_last=True)
    first = trained(1, logger=spy)
    watch, module, data = listed[0]
    first.save_checkpoint(path)
    results = [
        first.validate(module, datamodule=data, verbose=False),
        first.test(module, datamodule=data, verbose=False),
    ]
    rows = sum(len(batch) for batch in first.predict(module, datamodule=data))
    resumed = trained(2, path=path)
    with pytest.raises(ValueError, match="as asked"):
        trained(2, fail_at=1)
    saving = trained(1, logger=Spy(folder), callbacks=[keep, Counter()], enable_checkpointing=True)
    return {
        "hooks": [[made.__dict__.get("hooks") for made in each] for each in listed],
        "losses": [each[0].losses for each in listed],
        "outputs": watch.outputs,
        "rates": [each[0].rates for each in listed],
        "results": [name for result in results for name in result[0].items()],
        "predicted": rows,
        "loaded": [made.loaded for made in listed[1]],
        "batches": [each[0].batches for each in listed] + [module.own.batches],
        "errors": [each[0].errors for each in listed],
        "steps": [first.global_step, resumed.global_step],
        "told": (spy.calls, saving.logger.calls),
        "root": first.default_root_dir == folder,
        "hparams": (of_the_user(module.hparams), dict(data.hparams)),
    }


@functools.cache
def results(layout: Layout | None, folder: str) -> list[dict[str, Any]]:
    return run_ranks(layout.world_size if layout else 1, run, layout, f"{folder}/{layout}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("hooks"))


def _elsewhere(hooks: Any) -> Any:
    """On the other ranks, which prepare nothing."""
    return [[_loading_apart([n for n in names or [] if n != "prepare_data"]) for names in each] for each in hooks]


def _loading_apart(hooks: list[str]) -> tuple[list[str], list[str]]:
    """A checkpoint is loaded once the model is built, after ``on_fit_start``, as by Lightning's FSDP strategy."""
    loads = ("on_load_checkpoint", "load_state_dict")
    return [name for name in hooks if name not in loads], [name for name in hooks if name in loads]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_hooks_are_called_in_lightnings_order(layout, folder):
    expected, (first, *others) = results(None, folder)[0], results(layout, folder)
    for mine, theirs in zip(first["hooks"], expected["hooks"], strict=True):
        for name, seen, reference in zip(("callback", "module", "data module"), mine, theirs, strict=True):
            assert _loading_apart(seen or []) == _loading_apart(reference or []), name
    assert all(_elsewhere(rank["hooks"]) == _elsewhere(expected["hooks"]) for rank in others)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_overrides_have_their_effect(layout, folder):
    expected = results(None, folder)[0]
    for seen in results(layout, folder):
        for mine, theirs in zip(seen["losses"], expected["losses"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
        for name in ("rates", "batches", "errors", "steps", "loaded", "predicted", "root", "hparams"):
            assert seen[name] == expected[name], name
        assert seen["outputs"] == pytest.approx(expected["outputs"], rel=1e-5)
        assert dict(seen["results"]) == pytest.approx(dict(expected["results"]), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_logger_is_told_the_same_on_rank_0_only(layout, folder):
    expected, (first, *others) = results(None, folder)[0], results(layout, folder)
    assert first["told"] == expected["told"]
    assert all(rank["told"] == ([], []) for rank in others)
    assert any(call[0] == "hyperparams" for call in first["told"][0])
    assert any(call[0] == "checkpoint" for call in first["told"][1])


class Helpers(OurGPT):
    """Calls what LightningModule offers to its own code."""

    def on_train_batch_end(self, *_: Any) -> None:
        strategy = self.trainer.strategy
        self.gathered = self.all_gather(torch.tensor(float(strategy.data_parallel_rank))).tolist()
        self.print(f"said by rank {self.global_rank}")
        self.asked = {
            "optimizer": type(self.optimizers()).__name__,
            "scheduler": type(self.lr_schedulers()).__name__,
            "mesh": self.device_mesh,
            "step": self.global_step,
            "epoch": self.current_epoch,
            "ranks": (self.global_rank, self.local_rank) == (strategy.global_rank, strategy.local_rank),
            "logger": (self.logger, self.loggers),
        }


def _helpers(layout: Layout) -> Any:
    import contextlib
    import io

    module, said = Helpers(CONFIG), io.StringIO()
    with contextlib.redirect_stdout(said):
        run = trainer(layout, max_steps=1)
        run.fit(module, DataLoader(Rows(text_samples(CONFIG, 8)), batch_size=4))
    return module.gathered, module.asked, said.getvalue().count("said by rank 0"), "said by rank 1" in said.getvalue()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_a_module_asks_of_lightning(layout):
    replicas = [float(replica) for replica in range(layout.dp)]
    for rank, (gathered, asked, said, others) in enumerate(run_ranks(layout.world_size, _helpers, layout)):
        assert gathered == replicas
        assert (said, others) == (int(rank == 0), False)
        assert asked == {
            "optimizer": "LightningAdamW",
            "scheduler": "StepLR",
            "mesh": None,
            "step": 1,
            "epoch": 0,
            "ranks": True,
            "logger": (None, []),
        }


class Partly(PlainModule):
    """Builds itself late, and trains a part only."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook = hook
        self.optimizer = lambda parameters: torch.optim.AdamW((p for p in parameters if p.requires_grad), lr=0.05)

    def forward(self, batch: Any) -> Any:
        return self.layers(batch["x"])

    def build(self) -> None:
        self.freeze()
        self.unfreeze()
        self.layers[0].requires_grad_(False)


class PartlyByOldHook(Partly):
    def configure_sharded_model(self) -> None:
        self.build()


class PartlyByNewHook(Partly):
    def configure_model(self) -> None:
        self.build()


def _partly(kind: type, ours: bool) -> Any:
    module, options = kind("x"), {"max_steps": 4, "use_distributed_sampler": False}
    start = module.layers[0].weight.detach().clone()
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    data = DataLoader(Rows({"x": x, "y": x[:, :1]}), batch_size=4)
    made = trainer(Layout(), **options) if ours else Trainer(accelerator="cpu", devices=1, **QUIET, **options)
    made.fit(module, data)
    loss = float(made.callback_metrics["inside"])
    predicted = torch.cat(made.predict(module, data))
    traced = module.to_torchscript(method="trace", example_inputs=({"x": x},))({"x": x})
    assert torch.equal(module.layers[0].weight, start)
    return predicted, traced, loss


@pytest.mark.parametrize("kind", [PartlyByOldHook, PartlyByNewHook])
def test_plain_modules_build_freeze_predict_and_export(kind):
    ours, theirs = run_ranks(1, _partly, kind, True)[0], run_ranks(1, _partly, kind, False)[0]
    for mine, reference in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine, reference)
    assert ours[2] == pytest.approx(theirs[2], rel=1e-5)
