"""Hugging Face datasets become the same samples from every source, shared out, and resumed to the bit."""

import json
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets.fingerprint import Hasher
from lightning.pytorch import Callback, seed_everything
from torch.utils.data import DataLoader, DistributedSampler

from lightning_megatron import BertConfig, BertModule, GPTConfig, GPTModule
from lightning_megatron.data import (
    ByteTokenizer,
    HFDataModule,
    MaskedLMCollator,
    TextDataModule,
    standard_library_sources,
)
from lightning_megatron.data.huggingface.documents import Encoder
from tests.reference.parallel_gpt import Watch
from tests.support.hf_data import made
from tests.support.layout import Layout
from tests.support.pages import names_of
from tests.support.ranks import RankError, run_ranks
from tests.support.trainer import trainer

EOD = ByteTokenizer.eod_id
FILES = [file for file in standard_library_sources() if 0 < file.stat().st_size < 2500][:18]
ROWS = [{"text": file.read_text(encoding="utf-8"), "label": number} for number, file in enumerate(FILES)]
TOKENS = [token for row in ROWS for token in [*row["text"].encode(), EOD]]
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


def write(folder: Path) -> dict[str, dict[str, Any]]:
    """The same rows in every form, as arguments of the data module."""
    rows, halves = datasets.Dataset.from_list(ROWS), []
    for number in range(2):
        half = rows.select(range(9 * number, 9 * number + 9))
        halves.append(str(folder / f"{number}.jsonl"))
        half.to_json(halves[-1])
        half.to_parquet(folder / f"{number}.parquet")
        half.to_csv(folder / f"{number}.csv")
    (folder / "folder").mkdir()
    for number, row in enumerate(ROWS):
        (folder / "folder" / f"{number:02}.txt").write_bytes(row["text"].encode())
    rows.to_json(folder / "all.jsonl")
    rows.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "saved_dict")
    return {
        "file": {"dataset": folder / "all.jsonl"},
        "json": {"dataset": "json", "data_files": halves},
        "csv": {"dataset": "csv", "data_files": str(folder / "*.csv")},
        "parquet": {"dataset": "parquet", "data_files": str(folder / "*.parquet")},
        "text folder": {"dataset": str(folder / "folder"), "load_options": {"sample_by": "document"}},
        "saved": {"dataset": folder / "saved"},
        "saved splits": {"dataset": str(folder / "saved_dict")},
        "object": {"dataset": rows},
        "mapping": {"dataset": {"train": rows}},
    }


def rows_of(loader: Any, key: str = "text") -> list[list[int]]:
    return [row for batch in loader for row in batch[key].tolist()]


def packed(tokens: list[int], length: int = 32) -> list[list[int]]:
    return [tokens[at : at + length + 1] for at in range(0, len(tokens) - length, length)]


# Sources and samples


@pytest.mark.parametrize("streaming", [False, True])
def test_every_source_gives_the_same_samples(tmp_path: Path, streaming: bool) -> None:
    for form, options in write(tmp_path).items():
        loader = made(**options, streaming=streaming, shuffle=False).train_dataloader()
        assert rows_of(loader) == packed(TOKENS), form


def test_rows_are_packed_as_files_are(tmp_path: Path) -> None:
    texts = [*FILES[:9], tmp_path / "empty.txt", *FILES[9:]]
    (tmp_path / "empty.txt").touch()
    ours = TextDataModule(list(texts), 32, 4, split=(1, 0, 0), shuffle=False, cache_dir=tmp_path / "packed")
    ours.prepare_data()
    ours.setup("fit")
    rows = datasets.Dataset.from_dict({"text": [file.read_text(encoding="utf-8") for file in texts]})
    for streaming in (False, True):
        loader = made(dataset=rows, shuffle=False, streaming=streaming).train_dataloader()
        assert rows_of(loader) == rows_of(ours.train_dataloader())


def test_samples_cross_arrows_batches_and_go_to_workers() -> None:
    rows = datasets.Dataset.from_list(ROWS * 4)
    module = made(dataset=rows, shuffle=False, num_proc=3, num_workers=2, seq_length=3000)
    assert rows_of(module.train_dataloader()) == packed(TOKENS * 4, 3000)
    samples = module.train_dataloader().dataset
    assert len(samples[0]["text"]) == 3001
    assert len(pickle.dumps(samples)) < len(TOKENS) * 4 < 4 * samples.num_tokens  # type: ignore[attr-defined]
    with pytest.raises(IndexError, match="no sample"):
        samples[len(samples)]  # type: ignore[arg-type]


def test_rows_are_padded_to_the_longest() -> None:
    texts = ["abc", "", "a longer text", "ab"]
    for streaming in (False, True):
        module = made(dataset=datasets.Dataset.from_dict({"text": texts}), packing=False, seq_length=8, shuffle=False,
                      streaming=streaming)  # fmt: skip
        (batch,) = module.train_dataloader()
        assert batch["input_ids"].tolist() == [
            [*b"abc", EOD, EOD, EOD, EOD, EOD],
            list(b"a longer"),
            [*b"ab", EOD, EOD, EOD, EOD, EOD, EOD],
        ]
        assert batch["attention_mask"].sum(1).tolist() == [4, 8, 3]
        expected = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        assert torch.equal(batch["labels"], expected)


def test_prompts_are_read_and_not_learnt() -> None:
    rows = {"question": ["1+1=", "a question that leaves no room", "2+2="], "answer": ["2", "x", "4"]}
    options = {"text_column": "answer", "prompt_column": "question", "packing": False, "seq_length": 8}
    for streaming in (False, True):
        module = made(dataset=datasets.Dataset.from_dict(rows), shuffle=False, streaming=streaming, **options)
        (batch,) = module.train_dataloader()
        assert batch["input_ids"].tolist() == [[*b"1+1=2", EOD], [*b"2+2=4", EOD]]
        assert batch["labels"].tolist() == [[-100] * 4 + [*b"2", EOD], [-100] * 4 + [*b"4", EOD]]


def test_ids_are_taken_as_they_are_and_columns_kept() -> None:
    rows = datasets.Dataset.from_dict({"ids": [[1, 2], [3]], "score": [0.5, 0.25], "other": ["x", "y"]})
    seen = []
    options = {"text_column": "ids", "append_eod": False, "packing": False, "shuffle": False, "collate_fn": seen.append}
    for streaming in (False, True):
        list(made(dataset=rows, keep_columns=["score"], streaming=streaming, **options).train_dataloader())
    assert seen == [[{"input_ids": [1, 2], "score": 0.5}, {"input_ids": [3], "score": 0.25}]] * 2


def test_collators_of_other_families_take_packed_rows() -> None:
    collate = MaskedLMCollator(258, mask_id=257, special_ids=[EOD])
    batch = next(iter(made(dataset=datasets.Dataset.from_list(ROWS), collate_fn=collate).train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 32)
    assert (batch["labels"] != -100).any()


# Splits and caches


def test_splits_are_slices_sums_or_shares() -> None:
    names = {"train": datasets.Dataset.from_list(ROWS[:10]), "dev": datasets.Dataset.from_list(ROWS[10:])}

    def texts(loader: Any) -> list[int]:
        return [int(label) for batch in loader for label in batch]

    def splits(dataset: Any, split: Any, **options: Any) -> list[list[int]]:
        def labels(samples: Any) -> list[int]:
            return [sample["label"] for sample in samples]

        module = made(dataset=dataset, split=split, packing=False, shuffle=False, keep_columns=["label"],
                      collate_fn=labels, stage="fit", **options)  # fmt: skip
        module.setup("test")
        return [texts(loader()) for loader in (module.train_dataloader, module.val_dataloader, module.test_dataloader)]

    numbers = list(range(18))
    assert splits(names, ("train[:50%]", "train[5:7]", "dev[-2:]+train[:1]")) == [
        numbers[:5],
        numbers[5:7],
        [16, 17, 0],
    ]
    assert splits(names["train"], (0.5, 0.3, 0.2)) == [numbers[:5], numbers[5:8], numbers[8:10]]
    assert splits(names, ("dev", "train", "train"), streaming=True) == [numbers[10:], numbers[:10], numbers[:10]]


def test_no_validation_where_there_is_no_split() -> None:
    module = made(dataset=datasets.Dataset.from_list(ROWS))
    assert module.val_dataloader() == module.test_dataloader() == []


@pytest.mark.parametrize("form", ["json", "object", "saved"])
def test_text_is_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    options, cache = write(tmp_path)[form], tmp_path / "cache" / "lightning_megatron"
    if form == "json":
        options = {**options, "num_proc": 2}
    HFDataModule(**options).prepare_data()
    files = sorted(cache.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(ByteTokenizer, "encode", lambda *_: pytest.fail("tokenised again"))
        if form == "object":  # as another process makes it
            options = {"dataset": datasets.Dataset.from_list(ROWS)}
        assert rows_of(made(**options, shuffle=False).train_dataloader()) == packed(TOKENS)
    assert sorted(cache.iterdir()) == files
    made(**options, append_eod=False)
    assert len(list(cache.iterdir())) == 2 * len(files)


def test_the_fingerprint_is_datasets_own() -> None:
    one, same, other = (datasets.Dataset.from_list(rows) for rows in (ROWS, ROWS, ROWS[:3]))
    assert one._fingerprint == same._fingerprint != other._fingerprint
    assert Hasher.hash([one._fingerprint]) == Hasher.hash([same._fingerprint])


# Replicas, in order and in training


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("packing", [True, False])
def test_streams_are_shared_out_by_shard_or_row(shards: int, packing: bool) -> None:
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=shards)
    epochs = []
    for rank in range(2):
        loader = made(dataset=stream, replicas=2, rank=rank, packing=packing, seq_length=64, shuffle_block=4)
        rows = loader.train_dataloader()
        rows.replicas = 1  # read to its end: the other is not there to agree with
        epochs.append([rows_of(rows, "text" if packing else "input_ids") for _ in range(2)])
    texts = Counter(row["text"].encode() for row in ROWS)
    for epoch in zip(*epochs, strict=True):
        if packing:
            seen = Counter(text for samples in epoch for text in _documents(samples))
            assert seen <= texts
            assert seen.total() >= 16, "but for the end of each replica's"
        else:
            seen = Counter(bytes(i for i in row if i != EOD) for samples in epoch for row in samples)
            assert seen == Counter(text[:64] for text in texts.elements())
    assert epochs[0][0] != epochs[0][1], "each epoch has its own order"


def _documents(samples: list[list[int]]) -> list[bytes]:
    """The whole documents in packed samples that follow each other."""
    tokens = [*samples[0], *(token for sample in samples[1:] for token in sample[1:])]
    ends = [at for at, token in enumerate(tokens) if token == EOD]
    return [bytes(tokens[start:end]) for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


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
    one, two = run_ranks(2, _fit_kinds, layout, KINDS, str(tmp_path))
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
    one, two = run_ranks(2, _fit_kinds, Layout(dp=2), {"stream": 5, "stream packed": 15}, str(tmp_path))
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
    for epochs, losses in run_ranks(layout.world_size, _resume, kind, layout, stops, str(tmp_path)):
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
    for mapped, streamed in run_ranks(2, _evaluate, str(tmp_path)):
        assert mapped[0] == streamed[0]  # the same rows on each replica, and so the same weights
        assert mapped[0][0] == pytest.approx(5.5, abs=0.2)
        assert sum(mapped[1]) == 18  # gathered and put in the data's order
        assert sum(streamed[1]) == 9  # each replica has its own


def _other_replicas(layout: Layout, path: str, load: bool) -> None:
    _train("stream", layout, 4 if load else 2, load=path if load else None, save=None if load else path)


def test_a_stream_is_not_resumed_on_other_replicas(tmp_path: Path) -> None:
    path = str(tmp_path / "two.ckpt")
    run_ranks(2, _other_replicas, Layout(dp=2), path, False)
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
    one, two = run_ranks(2, _bert, str(tmp_path))
    assert one == two == pytest.approx(5.55, abs=0.3)


def _page(folder: str) -> Any:
    names = names_of("hf_data.md", folder)
    return names["trainer"].global_step, float(names["trainer"].callback_metrics["train_loss"])


def test_the_page(tmp_path: Path) -> None:
    for steps, loss in run_ranks(2, _page, str(tmp_path)):
        assert steps == 30
        assert loss < 5  # 5.55 knows nothing


# Errors

SOME = datasets.Dataset.from_list(ROWS[:2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_length": 0}, "seq_length=0) must be at least 1"),
        ({"num_proc": 0}, "num_proc=0) must be at least 1"),
        ({"split": ("train", "test")}, "must be three names"),
        ({"split": "train"}, "split='train') must name three"),
        ({"split": (0.5, 0.6, 0.1)}, "split=(0.5, 0.6, 0.1)"),
        ({"split": (0.5, "test", None)}, "must be three names"),
        ({"prompt_column": "label"}, "packed rows share samples"),
        ({"packing": False, "keep_columns": ["label"]}, "needs a collate_fn"),
        ({"streaming": True, "num_proc": 2}, "tokenised as it is read"),
    ],
)
def test_arguments_that_make_no_sense(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        HFDataModule(SOME, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset": "nobody/nothing"}, r"dataset='nobody/nothing'\): datasets cannot load it.*hub where it can be"),
        ({"dataset": "/no/such/folder"}, r"dataset='/no/such/folder'\): datasets cannot load it.*seen from"),
        ({"dataset": "json", "data_files": "none.jsonl"}, r"cannot load it with .*none.jsonl"),
        ({"dataset": SOME, "text_column": "txt"}, r"text_column='txt'.*\['text', 'label'\]. Did you mean 'text'\?"),
        ({"dataset": SOME, "prompt_column": "labels", "packing": False}, r"prompt_column='labels'.*mean 'label'\?"),
        ({"dataset": SOME, "text_column": "label"}, r"column 'label' holds 0, which is neither text nor"),
        ({"dataset": SOME, "split": ("trian", None, None)}, r"split='trian'.*\['train'\]. Did you mean 'train'\?"),
        ({"dataset": SOME.select([])}, r"the train split is empty, with split=\('train', None, None\)"),
        ({"dataset": SOME, "split": (0.9, 0.1, 0.0)}, "the val split is empty"),
        ({"dataset": SOME, "seq_length": 9999}, r"train split has no sample: its 2 rows have \d+ tokens.*10000"),
        (
            {"dataset": datasets.Dataset.from_dict({"text": ["", ""]}), "packing": False},
            "no text to learn in seq_length=32",
        ),
        ({"dataset": SOME, "stage": "test"}, "names no test split"),
    ],
)
def test_mistakes_are_named_before_the_first_step(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made(**options)


def test_half_a_surrogate_pair_is_named() -> None:
    encoder = Encoder(ByteTokenizer(), "text", None, (), append_eod=False, max_length=None)
    with pytest.raises(
        ValueError, match=r"column 'text' has \\udc00, half of a surrogate pair.*in 'a .*Correct the row"
    ):
        encoder({"text": "a \udc00"})


def test_mistakes_with_streams() -> None:
    stream = SOME.to_iterable_dataset()
    for options, words in (
        ({"split": (0.5, 0.5, 0.0)}, "stream's length is not known"),
        ({"split": ("train[:50%]", None, None)}, "a stream is read whole"),
        ({"text_column": "txt"}, r"Did you mean 'text'\?"),
        ({"num_workers": 2}, r"num_workers=2\): a stream is read in the training process"),
    ):
        with pytest.raises(ValueError, match=words):
            made(dataset=stream, **options)
    with pytest.raises(ValueError, match="the train split is empty"):
        made(dataset=SOME.select([]), streaming=True)
    with pytest.raises(ValueError, match="the train split is empty"):
        made(dataset=stream.filter(lambda _: False))


def test_what_is_no_dataset_and_what_is_not_ready() -> None:
    with pytest.raises(TypeError, match="give a name, a path, a Dataset"):
        made(dataset=[1, 2])
    with pytest.raises(RuntimeError, match="has no data yet"):
        HFDataModule(SOME).train_dataloader()
    with pytest.raises(ValueError, match="too few for one batch of 4000"):
        made(dataset=SOME, drop_last=True, batch_size=4000).train_dataloader()


def test_the_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'lightning-megatron[datasets]'")):
        HFDataModule("json").prepare_data()


def test_training_loaders_are_what_resumption_knows() -> None:
    mapped = made(dataset=SOME).train_dataloader()
    assert isinstance(mapped.sampler, DistributedSampler)
    streamed = made(dataset=SOME, streaming=True).train_dataloader()
    assert isinstance(streamed, DataLoader)
    assert json.dumps(made(dataset=SOME, streaming=True, packing=False).train_dataloader().state_dict())
