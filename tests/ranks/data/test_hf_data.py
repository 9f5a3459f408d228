"""Hugging Face datasets become the same samples from every source, shared out, and resumed to the bit."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import Callback, seed_everything

from lightning_megatron import BertConfig, BertModule, GPTConfig, GPTModule
from lightning_megatron.data import (
    HFDataModule,
    MaskedLMCollator,
)
from tests.reference.parallel_gpt import Watch
from tests.support.hf_rows import EOD, ROWS
from tests.support.layout import Layout
from tests.support.pages import names_of
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import trainer

CONFIG = GPTConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=2,
    vocab_size=264,  # no padding, which no checkpoint keeps
    seq_length=32,
    make_vocab_size_divisible_by=4,
    hidden_dropout=0.1,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # no minutes of asking for what cannot be reached


# Sources and samples


# Splits and caches


# Replicas, in order and in training


class Seen(Callback):
    """Notes the rows this rank trains on."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        batch = batch.get("input_ids", batch.get("text"))
        self.rows += [tuple(row) for row in batch.tolist()]


def _numbered(kind: str, count: int) -> dict[str, Any]:
    """Rows that can be told from each other: ``count`` of them, or as many samples of 32 tokens."""
    texts = [f"{number:031}" for number in range(count)]
    rows = datasets.Dataset.from_dict({"text": [*texts, "x"] if "packed" in kind else texts})
    dataset = rows if "map" in kind else rows.to_iterable_dataset(num_shards=1)
    return {"dataset": dataset, "packing": "packed" in kind, "seq_length": 32, "seed": 3, "shuffle_block": 5}


def _fit_kinds(layout: Layout, counts: dict[str, int], folder: str) -> dict[str, Any]:
    datasets.config.HF_DATASETS_CACHE = Path(folder)
    seen: dict[str, Any] = {}
    for kind, count in counts.items():
        callback, data = Seen(), HFDataModule(**_numbered(kind, count), batch_size=2)
        run = trainer(layout, max_epochs=1, callbacks=[callback])
        run.fit(GPTModule(CONFIG), data)
        seen[kind] = {"dp": run.strategy.data_parallel_rank, "rows": callback.rows, "steps": run.global_step}
    return seen


KINDS = {"map packed": 16, "map": 16, "stream packed": 17, "stream": 16}


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(tp=2)], ids=str)
def test_replicas_share_the_samples_and_peers_read_the_same(tmp_path: Path, layout: Layout) -> None:
    one, two = run_in_pool(2, _fit_kinds, layout, KINDS, str(tmp_path))
    for kind in KINDS:
        rows = [*one[kind]["rows"], *two[kind]["rows"]]
        if layout.tp == 2:
            assert one[kind] == two[kind]
            rows = one[kind]["rows"]
        if kind == "stream packed":  # in the order of its documents, of which one is short
            assert len(set(rows)) == len(rows) == (16 if layout.dp == 2 else 17)
        else:
            assert sorted(int(bytes(row[:31])) for row in rows) == list(range(16))


def test_streams_of_unequal_replicas_end_together(tmp_path: Path) -> None:
    one, two = run_in_pool(2, _fit_kinds, Layout(dp=2), {"stream": 5, "stream packed": 15}, str(tmp_path))
    assert one["stream"]["steps"] == two["stream"]["steps"] == 1  # of two batches, of 2 + 1 rows, and one of 2
    assert len({*one["stream"]["rows"], *two["stream"]["rows"]}) == 4
    assert one["stream packed"]["steps"] == two["stream packed"]["steps"] > 2


# Resumption


def _train(kind: str, layout: Layout, steps: int, load: str | None = None, save: str | None = None) -> dict[str, Any]:
    seed_everything(11 if load is None else 99, verbose=False)
    watch, seen = Watch(), Seen()
    run = trainer(layout, max_steps=steps, callbacks=[watch, seen])
    rows = datasets.Dataset.from_list([{"text": row["text"][:150]} for row in ROWS] * 2)
    dataset = rows if "map" in kind else rows.to_iterable_dataset(num_shards=2)
    data = HFDataModule(dataset, seq_length=32, batch_size=4, packing="packed" in kind, shuffle_block=8)
    module = GPTModule(CONFIG)
    run.fit(module, data, ckpt_path=load)
    if save is not None:
        run.save_checkpoint(save)
    weights = {name: value.detach().clone() for name, value in module.named_parameters()}
    where = (run.current_epoch, run.fit_loop.epoch_loop.batch_progress.total.processed)
    return {"losses": watch.losses, "rows": seen.rows, "weights": weights, "where": where, "epoch": run.current_epoch}


def _resume(kind: str, layout: Layout, stops: list[int], folder: str) -> Any:
    datasets.config.HF_DATASETS_CACHE = Path(folder)
    whole = _train(kind, layout, max(stops) + 4)
    epochs = []
    for stop in stops:
        path = f"{folder}/{kind} {stop}.ckpt"
        before = _train(kind, layout, stop, save=path)
        after = _train(kind, layout, max(stops) + 4, load=path)
        assert before["losses"] + after["losses"] == whole["losses"]
        assert before["rows"] + after["rows"] == whole["rows"]
        assert after["where"] == whole["where"]
        for name, value in whole["weights"].items():
            assert torch.equal(after["weights"][name], value), name
        epochs.append(before["epoch"])
    return epochs, len(set(whole["losses"]))


# An epoch of 36 rows has five batches of four on each of two replicas, and nine on one. One of packed rows has about
# 5,000 tokens, 19 batches on each of two.
@pytest.mark.parametrize(
    ("kind", "layout", "stops"),
    [
        ("stream", Layout(dp=2), [3, 5, 7]),
        ("stream packed", Layout(dp=2), [4, 23]),
        ("stream packed", Layout(tp=2), [3]),
        ("stream", Layout(), [9, 18]),
        ("map", Layout(dp=2), [3, 5, 7]),
        ("map packed", Layout(dp=2), [4, 23]),
    ],
    ids=str,
)
def test_stopped_and_resumed_is_uninterrupted(tmp_path: Path, kind: str, layout: Layout, stops: list[int]) -> None:
    for epochs, losses in run_in_pool(layout.world_size, _resume, kind, layout, stops, str(tmp_path)):
        assert losses > 5
        assert epochs[-1] >= (1 if max(stops) > 4 else 0)


def _evaluate(folder: str) -> Any:
    datasets.config.HF_DATASETS_CACHE = Path(folder)
    results = []
    for streaming in (False, True):
        data = HFDataModule(
            datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "dev": datasets.Dataset.from_list(ROWS)}),
            split=("train", "dev", "dev"),
            streaming=streaming,
            packing=False,
            shuffle=False,
            seq_length=32,
            batch_size=3,
        )
        seed_everything(1, verbose=False)
        module, run = GPTModule(CONFIG), trainer(Layout(dp=2), max_epochs=1)
        run.fit(module, data)
        validated = [float(run.callback_metrics["val_loss"])]
        validated += [run.validate(module, data, verbose=False)[0]["val_loss"]]
        results.append((validated, [len(batch) for batch in run.predict(module, data)]))
    return results


def test_datasets_and_streams_are_evaluated_alike(tmp_path: Path) -> None:
    for mapped, streamed in run_in_pool(2, _evaluate, str(tmp_path)):
        assert mapped[0] == streamed[0]  # the same rows on each replica, and so the same weights
        assert mapped[0][0] == pytest.approx(5.5, abs=0.2)
        assert sum(mapped[1]) == 18  # gathered and put in the data's order
        assert sum(streamed[1]) == 9  # each replica has its own


def _other_replicas(layout: Layout, path: str, load: bool) -> None:
    _train("stream", layout, 4 if load else 2, load=path if load else None, save=None if load else path)


def test_a_stream_is_not_resumed_on_other_replicas(tmp_path: Path) -> None:
    path = str(tmp_path / "two.ckpt")
    run_in_pool(2, _other_replicas, Layout(dp=2), path, False)
    with pytest.raises(RankError, match="has a state_dict.*2 in all; this run has 1 replicas"):
        run_ranks(1, _other_replicas, Layout(), path, True)


def _bert(folder: str) -> float:
    datasets.config.HF_DATASETS_CACHE = Path(folder)
    config = BertConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=258, seq_length=32, task="masked_lm"
    )
    collate = MaskedLMCollator(258, mask_id=257, special_ids=[EOD])
    data = HFDataModule(datasets.Dataset.from_list(ROWS), seq_length=32, collate_fn=collate)
    run = trainer(Layout(tp=2), max_steps=2)
    run.fit(BertModule(config), data)
    return float(run.callback_metrics["train_loss"])


def test_bert_is_trained_from_packed_rows(tmp_path: Path) -> None:
    one, two = run_in_pool(2, _bert, str(tmp_path))
    assert one == two == pytest.approx(5.55, abs=0.3)


def _page(folder: str) -> Any:
    names = names_of("hf_data.md", folder)
    return names["trainer"].global_step, float(names["trainer"].callback_metrics["train_loss"])


def test_the_page(tmp_path: Path) -> None:
    for steps, loss in run_ranks(2, _page, str(tmp_path)):
        assert steps == 30
        assert loss < 5  # 5.55 knows nothing


# Errors
