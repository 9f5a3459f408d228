"""Rows of Hugging Face datasets become the same samples from every source."""

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
from torch.utils.data import DataLoader, DistributedSampler

from lightning_megatron.data import (
    ByteTokenizer,
    HFDataModule,
    MaskedLMCollator,
    TextDataModule,
)
from lightning_megatron.data.huggingface.documents import Encoder
from tests.support.hf_data import made
from tests.support.hf_rows import EOD, FILES, ROWS

TOKENS = [token for row in ROWS for token in [*row["text"].encode(), EOD]]


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
        ({"prompt_column": "label"}, "packed samples hold several rows"),
        ({"packing": False, "keep_columns": ["label"]}, "needs a collate_fn"),
        ({"streaming": True, "num_proc": 2}, "tokenised while it is read"),
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
        ({"dataset": SOME, "text_column": "label"}, r"column 'label' holds 0, which is neither text, nor"),
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
        ({"split": (0.5, 0.5, 0.0)}, "a stream has no known length"),
        ({"split": ("train[:50%]", None, None)}, "a stream has no slices"),
        ({"text_column": "txt"}, r"Did you mean 'text'\?"),
        ({"num_workers": 2}, r"num_workers=2\): only the training process can read a stream"),
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


TEXTS = [[*row["text"].encode()[:99], EOD] for row in ROWS]


def texts_in(batch: dict[str, torch.Tensor], length: int) -> list[list[int]]:
    """The texts of a batch's rows; each predicts its own tokens but the first one."""
    found = []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        assert len(ids) <= length
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, stop in zip(starts, starts[1:], strict=False):
            if (labels[start + 1 : stop] != -100).any():  # padding has no label
                assert labels[start] == -100
                assert torch.equal(labels[start + 1 : stop], ids[start + 1 : stop])
                found.append(ids[start:stop].tolist())
    return found


@pytest.mark.parametrize("streaming", [False, True])
def test_whole_texts_share_rows(streaming: bool) -> None:
    options = {"streaming": streaming, "packing": "whole", "seq_length": 250, "batch_size": 4, "shuffle": False}
    rows = [{"text": row["text"][:99]} for row in ROWS]
    batches = list(made(dataset=datasets.Dataset.from_list(rows), **options).train_dataloader())
    assert sum(len(batch["input_ids"]) for batch in batches) <= len(ROWS) / 2, "two texts and more share a row"
    assert sorted(text for batch in batches for text in texts_in(batch, 250)) == sorted(TEXTS)


def test_a_collator_is_given_the_number_of_each_text() -> None:
    collate = MaskedLMCollator(ByteTokenizer.vocab_size, mask_id=1, pad_id=EOD)
    data = made(dataset=datasets.Dataset.from_list(ROWS), packing="whole", seq_length=100, collate_fn=collate)
    for batch in data.train_dataloader():
        ends = (batch["input_ids"] == EOD) & (batch["attention_mask"] > 0)
        begins = torch.nn.functional.pad(batch["seq_idx"].diff(dim=1) != 0, (0, 1)) & (batch["attention_mask"] > 0)
        assert (ends[:, :-1] <= begins[:, :-1]).all()
        assert (batch["seq_idx"].diff(dim=1) >= 0).all()


def test_prompts_may_share_rows_and_columns_may_not() -> None:
    rows = datasets.Dataset.from_dict({"prompt": ["ab", "cde"], "text": ["fg", "h"]})
    (batch,) = made(
        dataset=rows, prompt_column="prompt", packing="whole", seq_length=16, shuffle=False
    ).train_dataloader()
    (found,) = [[label for label in row if label != -100] for row in batch["labels"].tolist()]
    assert bytes(token for token in found if token != EOD) in (b"fgh", b"hfg")
    with pytest.raises(ValueError, match="no columns of a row"):
        made(dataset=rows, keep_columns=["prompt"], packing="whole", collate_fn=len)
