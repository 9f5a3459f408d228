"""Lightning's own callbacks under the strategy: each does what it does in Lightning, or is refused before training."""

import csv
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    DeviceStatsMonitor,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    TQDMProgressBar,
)
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.lightning_runs import CONFIG, OurGPT, VanillaGPT, trainer_of
from tests.support.ranks import RankError, run_in_pool, run_ranks

LAYOUTS = [Layout(pp=2), Layout(tp=2, dp=2)]


def _loader(layout: Layout | None, rows: int = 32) -> DataLoader:
    """Batches of four rows over all replicas, every one the same, so that their order does not matter."""
    first = text_samples(CONFIG, 1)
    same = {name: value.expand(rows, -1) for name, value in first.items()}
    return DataLoader(Rows(same), batch_size=4 // (layout.dp if layout else 1))


def _module(layout: Layout | None) -> Any:
    return OurGPT(CONFIG) if layout else VanillaGPT()


def _checkpoints(layout: Layout | None, folder: str) -> dict[str, Any]:
    best = ModelCheckpoint(
        f"{folder}/best",
        "{step}-{val_loss:.3f}",
        monitor="val_loss",
        mode="max",
        save_top_k=2,
        save_last=True,
        auto_insert_metric_name=False,
    )
    each = ModelCheckpoint(f"{folder}/each", "{step}", every_n_train_steps=3, save_top_k=-1, save_weights_only=True)
    run = trainer_of(
        layout, folder, max_steps=6, val_check_interval=2, callbacks=[best, each], enable_checkpointing=True
    )
    run.fit(_module(layout), _loader(layout), _loader(layout, 8))
    run.strategy.barrier()
    return {
        "best": Path(best.best_model_path).name,
        "score": float(best.best_model_score),
        "kept": sorted(Path(path).name for path in best.best_k_models),
        "files": sorted(path.name for path in Path(folder).glob("*/*") if "metrics" not in path.name),
        "last": Path(best.last_model_path).name,
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_model_checkpoint_keeps_what_lightning_keeps(layout, tmp_path):
    expected = run_in_pool(1, _checkpoints, None, str(tmp_path / "vanilla"))[0]
    for seen in run_in_pool(layout.world_size, _checkpoints, layout, str(tmp_path / "ours")):
        assert seen["score"] == pytest.approx(expected["score"], rel=1e-5)
        assert {**seen, "score": 0} == {**expected, "score": 0}


class Fails(OurGPT):
    """Raises on every rank, or on one."""

    def __init__(self, rank: int | None) -> None:
        super().__init__(CONFIG)
        self.rank = rank

    def on_train_batch_start(self, *_: Any) -> None:
        if self.global_step == 2 and self.rank in (None, self.trainer.global_rank):
            raise ValueError("the second step is refused")


SAVING = {
    "ModelCheckpoint": functools.partial(ModelCheckpoint, save_on_exception=True),
    "OnExceptionCheckpoint": OnExceptionCheckpoint,
}


def _fail(layout: Layout, folder: str, rank: int | None, kind: str = "ModelCheckpoint") -> None:
    keep = SAVING[kind](folder, filename="kept")
    trainer_of(layout, folder, callbacks=[keep], enable_checkpointing=True).fit(Fails(rank), _loader(layout))


@pytest.mark.parametrize("kind", SAVING)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_checkpoint_on_an_exception_that_all_ranks_have(layout, kind, tmp_path):
    with pytest.raises(RankError, match="the second step is refused"):
        run_ranks(layout.world_size, _fail, layout, str(tmp_path), None, kind)
    assert any(path.name.startswith("kept") for path in tmp_path.iterdir())


def test_no_checkpoint_and_no_hanging_on_an_exception_that_one_rank_has(tmp_path):
    with pytest.raises(RankError, match="the second step is refused") as error:
        run_ranks(2, _fail, Layout(pp=2), str(tmp_path), 1, timeout=60)
    assert "gave no result" not in str(error.value)
    assert "No checkpoint was saved" in str(error.value)
    assert not any(path.name.startswith("kept") for path in tmp_path.iterdir())


def _summary(layout: Layout | None, kind: type[ModelSummary], depth: int) -> dict[str, Any]:
    kept: dict[str, Any] = {}

    class Kept(kind):  # type: ignore[misc,valid-type]
        @staticmethod
        def summarize(summary_data, total_parameters, trainable_parameters, *args: Any, **kwargs: Any) -> None:
            kept.update(rows=dict(summary_data), total=total_parameters, trainable=trainable_parameters)
            kind.summarize(summary_data, total_parameters, trainable_parameters, *args, **kwargs)

    module = _module(layout)
    run = trainer_of(layout, ".", max_steps=1, callbacks=[Kept(max_depth=depth)], enable_model_summary=True)
    run.fit(module, _loader(layout))
    return kept


@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(tp=2, pp=2)], ids=str)
@pytest.mark.parametrize("kind", [ModelSummary, RichModelSummary])
def test_the_summary_counts_the_whole_model(kind, layout):
    expected = run_ranks(1, _summary, None, ModelSummary, 1)[0]
    seen, *others = run_ranks(layout.world_size, _summary, layout, kind, 2)
    assert (seen["total"], seen["trainable"]) == (expected["total"], expected["trainable"])
    assert not any(others)
    assert len([name for name in seen["rows"]["Name"] if name.endswith("chunks")]) == layout.pp


def _bar(layout: Layout, kind: type, log: str) -> str:
    import sys

    with Path(log).open("a") as out:
        sys.stdout = sys.stderr = out
        bar = kind(refresh_rate=1)
        run = trainer_of(layout, ".", callbacks=[bar], enable_progress_bar=True, log_every_n_steps=1)
        run.fit(_module(layout), _loader(layout), _loader(layout, 8))
        shown = bar.get_metrics(run, run.lightning_module)
    return str(sorted(name for name in shown if name != "v_num"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_progress_bars_show_the_loss_once(kind, layout, tmp_path):
    log = tmp_path / "log"
    shown = run_ranks(layout.world_size, _bar, layout, kind, str(log))
    assert set(shown) == {"['train_loss']"} or set(shown) == {"['train_loss', 'val_loss']"}
    text = log.read_text()
    assert re.search(r"4/[48]", text)
    # Rank 0 alone draws the bar, and each drawing of it names the loss once.
    drawings = [line for line in re.split(r"[\r\n]", text) if re.search(r"\b[1-4]/4\b.*train_loss", line)]
    assert drawings
    assert {line.count("train_loss") for line in drawings} == {1}


def _monitors(layout: Layout, folder: str) -> dict[str, Any]:
    called: list[str] = []
    callbacks: list[Callback] = [
        LearningRateMonitor(),
        DeviceStatsMonitor(cpu_stats=True),
        ThroughputMonitor(batch_size_fn=lambda batch: batch["tokens"].size(0), window_size=2),
        LambdaCallback(on_train_batch_end=lambda *_: called.append("end")),
    ]
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    run = trainer_of(layout, folder, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    run.fit(_module(layout), _loader(layout))
    rows = list(csv.DictReader((Path(folder) / "metrics.csv").open())) if run.is_global_zero else []
    return {"called": len(called), "rows": rows, "rate": run.optimizers[0].param_groups[0]["lr"]}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_monitors_write_to_the_logger(layout, tmp_path):
    seen, *others = run_in_pool(layout.world_size, _monitors, layout, str(tmp_path))
    assert {rank["called"] for rank in [seen, *others]} == {4}
    for name, values in {
        "lr-AdamW": [100 * seen["rate"]] * 2 + [10 * seen["rate"]] * 2,  # a tenth of it after each epoch of two batches
        "train/batches": [1, 2, 3, 4],
        "train/samples": [rows * (4 // layout.dp) for rows in (1, 2, 3, 4)],  # of this replica
    }.items():
        logged = [float(row[name]) for row in seen["rows"] if row.get(name)]
        assert logged == pytest.approx(values)
    name = "DeviceStatsMonitor.on_train_batch_end/cpu_percent"
    used = [float(row[name]) for row in seen["rows"] if row.get(name)]
    assert used
    assert all(0 <= value <= 100 for value in used)


class WithRate(OurGPT):
    lr = 1e-3

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class VanillaWithRate(VanillaGPT):
    lr = 1e-3

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def _rates(layout: Layout | None, folder: str, as_callback: bool) -> dict[str, Any]:
    module = WithRate(CONFIG) if layout else VanillaWithRate()
    options = {"num_training": 20, "min_lr": 1e-5, "max_lr": 1e-1}
    if as_callback:
        finder = LearningRateFinder(num_training_steps=20, min_lr=1e-5, max_lr=1e-1)
        run = trainer_of(layout, folder, callbacks=[finder], max_steps=2)
        run.fit(module, _loader(layout, 200))
        found = finder.optimal_lr
    else:
        run = trainer_of(layout, folder)
        found = Tuner(run).lr_find(module, _loader(layout, 200), **options)
    left = [path.name for path in Path(folder).iterdir()]
    return {"results": found.results, "suggestion": found.suggestion(), "lr": module.lr, "left": left}


@pytest.mark.parametrize("as_callback", [False, True], ids=["tuner", "callback"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_learning_rate_finder(layout, as_callback, tmp_path):
    for name in ("vanilla", "ours"):
        (tmp_path / name).mkdir()
    expected = run_in_pool(1, _rates, None, str(tmp_path / "vanilla"), as_callback)[0]
    for seen in run_in_pool(layout.world_size, _rates, layout, str(tmp_path / "ours"), as_callback):
        assert seen["results"]["lr"] == pytest.approx(expected["results"]["lr"])
        assert seen["results"]["loss"] == pytest.approx(expected["results"]["loss"], rel=1e-4)
        assert (seen["suggestion"], seen["lr"]) == pytest.approx((expected["suggestion"], expected["lr"]), rel=1e-4)
        assert seen["left"] == []


class Writer(BasePredictionWriter):
    def __init__(self, folder: str) -> None:
        super().__init__(write_interval="batch_and_epoch")
        self.folder = folder
        self.epoch: list[Any] = []

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        torch.save((batch_indices, prediction), f"{self.folder}/{trainer.global_rank}-{batch_idx}")

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.epoch = batch_indices


def _write(layout: Layout, folder: str) -> list[Any]:
    writer = Writer(folder)
    rows = DataLoader(Rows(text_samples(CONFIG, 8)), batch_size=4 // layout.dp)
    trainer_of(layout, folder, callbacks=[writer]).predict(_module(layout), rows)
    return writer.epoch


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_prediction_writers(layout, tmp_path):
    indices = run_in_pool(layout.world_size, _write, layout, str(tmp_path))
    written = [torch.load(path) for path in tmp_path.iterdir()]
    assert sorted({i for numbers, _ in written for i in numbers}) == list(range(8))
    assert all(len(numbers) == len(prediction) for numbers, prediction in written)
    assert len(indices[0][0]) == 2


REFUSED = {
    "BatchSizeFinder": BatchSizeFinder,
    "StochasticWeightAveraging": functools.partial(StochasticWeightAveraging, swa_lrs=1e-3),
    "WeightAveraging": WeightAveraging,
    "BackboneFinetuning": BackboneFinetuning,
    "ModelPruning": functools.partial(ModelPruning, "l1_unstructured"),
}


def _refused(layout: Layout, name: str) -> None:
    trainer_of(layout, ".", callbacks=[REFUSED[name]()]).fit(_module(layout), _loader(layout))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    with pytest.raises(RankError, match="(?i)not (work|supported).*" if name == "BatchSizeFinder" else name) as error:
        run_ranks(2, _refused, Layout(pp=2), name, timeout=40)
    assert "gave no result" not in str(error.value)
