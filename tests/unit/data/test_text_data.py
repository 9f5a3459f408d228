"""Text becomes the same samples in every run, on every rank, and every mistake is named."""

import json
import multiprocessing
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_megatron.data import (
    ByteTokenizer,
    PackedTextDataset,
    SpanCorruptionCollator,
    TextDataModule,
    standard_library_sources,
)
from lightning_megatron.data.text.packing import find_packed, pack
from lightning_megatron.data.text_files import find_text_files
from lightning_megatron.data.tokenizers import END_OF_DOCUMENT, Tokenizer, load_tokenizer, train_bpe

EOD = ByteTokenizer.eod_id


class WideTokenizer(ByteTokenizer):
    """Bytes, in a vocabulary too large for 16 bits."""

    vocab_size = 2**16 + 1
    eod_id = 2**16
    identity = "wide"


class WrongTokenizer(ByteTokenizer):
    """Claims fewer ids than it gives."""

    vocab_size = 100
    identity = "wrong"


class RecordingModel(BoringModel):
    """Notes what it is trained and validated on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": []}

    def on_train_epoch_start(self) -> None:
        self.seen["train"].append([])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen["train"][-1] += batch["text"][:, 0].tolist()
        return self.layer(torch.ones(1, 32)).sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.seen["val"].append(batch["text"][:, 0].tolist())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three documents: 100 + 60 + 37 bytes, 200 tokens with the ends of document."""
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_bytes(bytes(range(100)).replace(b"\r", b"_"))
    (folder / "b" / "c.py").write_bytes(bytes(range(60, 120)))
    (folder / "d.md").write_bytes(b"x" * 37)
    (folder / "empty.txt").touch()
    (folder / "ignored.bin").write_bytes(b"no text")
    return folder


def files_of(corpus: Path) -> list[Path]:
    return find_text_files(corpus, (".txt", ".py", ".md"))


def numbered(tmp_path: Path, seq_length: int, **kwargs: Any) -> TextDataModule:
    """A module of 120 one-token documents; with ``seq_length=2``, sample ``i`` begins with the token ``i``."""
    folder = tmp_path / "numbered"
    folder.mkdir(exist_ok=True)
    for i in range(121):
        (folder / f"{i:03}.txt").write_bytes(b"_" if chr(i) == "\r" else bytes([i]))
    return TextDataModule(folder, seq_length, cache_dir=tmp_path / "cache", **kwargs)


def ready(module: TextDataModule, stage: str | None = None) -> TextDataModule:
    module.prepare_data()
    module.setup(stage)
    return module


def first_tokens(loader: Any) -> list[int]:
    return [token for batch in loader for token in batch["text"][:, 0].tolist()]


def fit(module: TextDataModule, tmp_path: Path, **kwargs: Any) -> RecordingModel:
    model = RecordingModel()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(model, module)
    return model


# Tokenizers


def test_bytes_round_trip() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode("aé漢\n")
    assert ids == [97, 195, 169, 230, 188, 162, 10]
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == "aé漢\n"
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (257, 256)


def test_bpe_round_trip_and_transformers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as RustTokenizer
    from transformers import PreTrainedTokenizerFast

    files = standard_library_sources()[:20]
    path = train_bpe(files, 400, tmp_path / "new" / "tokenizer.json")
    text = files[3].read_text() + "漢 never seen é\n"
    rust = RustTokenizer.from_file(str(path))
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token=END_OF_DOCUMENT)
    fast.save_pretrained(tmp_path / "folder")
    loaded = [load_tokenizer(source) for source in (path, str(path), rust, fast, tmp_path / "folder")]
    for tokenizer in loaded:
        ids = tokenizer.encode(text)
        assert ids == loaded[0].encode(text)
        assert tokenizer.decode([*ids, tokenizer.eod_id]) == text
        assert len(ids) < len(text.encode()) * 0.8
        assert tokenizer.vocab_size == 400
        assert tokenizer.eod_id == rust.token_to_id(END_OF_DOCUMENT)
    assert loaded[0].identity == loaded[1].identity == loaded[2].identity
    assert list(path.parent.iterdir()) == [path]


def test_a_tokenizer_json_that_truncates_does_not_cut_documents(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as RustTokenizer

    path = train_bpe(standard_library_sources()[:2], 300, tmp_path / "tokenizer.json")
    rust = RustTokenizer.from_file(str(path))
    rust.enable_truncation(4)
    rust.save(str(path))
    assert len(load_tokenizer(path).encode("a b c d e f g h")) > 8


def test_another_bpe_is_another_identity(tmp_path: Path) -> None:
    files = standard_library_sources()[:2]
    paths = [train_bpe(files, size, tmp_path / f"{size}.json") for size in (300, 310)]
    assert len({load_tokenizer(path).identity for path in paths}) == 2


def test_own_tokenizer_is_taken_as_it_is() -> None:
    tokenizer = WideTokenizer()
    assert isinstance(tokenizer, Tokenizer)
    assert load_tokenizer(tokenizer) is tokenizer


def test_tokenizer_errors(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import models

    for missing in (tmp_path / "none", str(tmp_path / "none.json"), "./none", "none.json"):
        with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*none"):
            load_tokenizer(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"transformers cannot load a tokenizer from '.*empty'"):
        load_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(TypeError, match="3 is no tokenizer"):
        load_tokenizer(3)
    with pytest.raises(ValueError, match=r"none of the end-of-document tokens .* among its 1 tokens"):
        load_tokenizer(RustTokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="neither `eos_token` nor `sep_token`"):
        load_tokenizer(SimpleNamespace(eos_token_id=None, sep_token_id=None))
    with pytest.raises(ValueError, match=r"vocab_size=256.*Use 257"):
        train_bpe([], 256, tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"must end in \.json"):
        train_bpe([], 300, tmp_path / "t")


# Sources


def test_folders_are_sorted_and_files_taken_once(corpus: Path) -> None:
    names = [file.relative_to(corpus).as_posix() for file in files_of(corpus)]
    assert names == ["a.txt", "b/c.py", "d.md", "empty.txt"]
    twice = find_text_files([corpus / "ignored.bin", str(corpus), corpus / "b"], (".py",))
    assert [file.name for file in twice] == ["ignored.bin", "c.py"]


def test_standard_library_holds_modules_and_packages_without_tests() -> None:
    files = standard_library_sources()
    ends = {"/".join(file.parts[-2:]) for file in files}
    assert {"json/decoder.py", "asyncio/tasks.py"} <= ends
    assert "argparse.py" in {file.name for file in files}
    assert files == sorted(files)
    assert not [file for file in files if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(file.parts)]


def test_source_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"text path .*none does not exist"):
        find_text_files(tmp_path / "none", (".py",))
    with pytest.raises(ValueError, match=r"No text file ends with one of \['\.py'\]"):
        find_text_files(tmp_path, (".py",))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="no standard library sources"):
        standard_library_sources()


# Packing


def test_documents_stand_one_after_another(corpus: Path, tmp_path: Path) -> None:
    files = files_of(corpus)
    tokens = np.fromfile(pack(files, ByteTokenizer(), tmp_path / "cache"), np.uint16).tolist()
    assert tokens == [t for file in files[:3] for t in [*file.read_bytes(), EOD]]


@pytest.mark.parametrize(("tokenizer", "dtype"), [(ByteTokenizer(), np.uint16), (WideTokenizer(), np.uint32)])
def test_dtype_follows_the_vocabulary(corpus: Path, tmp_path: Path, tokenizer: Tokenizer, dtype: type) -> None:
    path = pack(files_of(corpus), tokenizer, tmp_path / "cache")
    assert path.stat().st_size == 200 * np.dtype(dtype).itemsize
    assert np.fromfile(path, dtype)[-1] == tokenizer.eod_id
    assert PackedTextDataset(path, 199)[0]["text"][-1] == tokenizer.eod_id


def test_a_second_run_reuses_the_cache(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pack(files_of(corpus), ByteTokenizer(), tmp_path / "cache")
    monkeypatch.setattr(ByteTokenizer, "encode", lambda *_: pytest.fail("tokenised again"))
    assert pack(files_of(corpus), ByteTokenizer(), tmp_path / "cache") == first


def test_a_changed_file_is_packed_again(corpus: Path, tmp_path: Path) -> None:
    cache, files = tmp_path / "cache", files_of(corpus)
    packed = [pack(files, ByteTokenizer(), cache), pack(files, WideTokenizer(), cache)]
    packed += [pack(files[:2], ByteTokenizer(), cache), pack(files[::-1], ByteTokenizer(), cache)]
    os.utime(files[2], ns=(0, 1))
    packed += [pack(files, ByteTokenizer(), cache)]
    files[2].write_bytes(b"y" * 38)
    os.utime(files[2], ns=(0, 1))
    packed += [pack(files, ByteTokenizer(), cache)]
    assert len(set(packed)) == len(packed)
    assert np.fromfile(packed[-1], np.uint16)[-39:].tolist() == [*b"y" * 38, EOD]


def cut_tokens(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def cut_description(path: Path) -> None:
    path.with_suffix(".json").write_text('{"dtype": "uin')


def empty_description(path: Path) -> None:
    path.with_suffix(".json").write_text(json.dumps({}))


def remove_description(path: Path) -> None:
    path.with_suffix(".json").unlink()


def remove_tokens(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [cut_tokens, cut_description, empty_description, remove_description, remove_tokens])
def test_a_damaged_cache_is_rebuilt(corpus: Path, tmp_path: Path, damage: Any) -> None:
    files = files_of(corpus)
    path = pack(files, ByteTokenizer(), tmp_path / "cache")
    whole = path.read_bytes()
    damage(path)
    assert find_packed(files, ByteTokenizer(), tmp_path / "cache") is None
    assert pack(files, ByteTokenizer(), tmp_path / "cache") == path
    assert path.read_bytes() == whole


def pack_and_die(files: list[Path], cache: Path) -> None:
    tokenizer = ByteTokenizer()
    encode = tokenizer.encode
    tokenizer.encode = lambda text: os._exit(9) if text.startswith("x") else encode(text)  # type: ignore
    pack(files, tokenizer, cache)


def test_a_killed_writer_leaves_nothing_that_is_read(corpus: Path, tmp_path: Path) -> None:
    cache, files = tmp_path / "cache", files_of(corpus)
    process = multiprocessing.get_context("fork").Process(target=pack_and_die, args=(files, cache))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert [file.suffix for file in cache.iterdir()] == [".tmp"]
    assert find_packed(files, ByteTokenizer(), cache) is None
    assert len(PackedTextDataset(pack(files, ByteTokenizer(), cache), 199)) == 1


def test_writers_at_once_agree(corpus: Path, tmp_path: Path) -> None:
    cache, files = tmp_path / "cache", files_of(corpus)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=pack, args=(files, ByteTokenizer(), cache)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(file.suffix for file in cache.iterdir()) == [".bin", ".json"]
    assert find_packed(files, ByteTokenizer(), cache) is not None


def test_packing_errors_leave_no_file(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"All 1 text files are empty, the first is .*empty\.txt"):
        pack([corpus / "empty.txt"], ByteTokenizer(), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"ids from 0 to 256 for .*a\.txt, outside its vocab_size of 100"):
        pack([corpus / "a.txt"], WrongTokenizer(), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


# The dataset


def test_neighbours_overlap_by_one_token(corpus: Path, tmp_path: Path) -> None:
    path = pack(files_of(corpus), ByteTokenizer(), tmp_path / "cache")
    tokens = np.fromfile(path, np.uint16).tolist()
    dataset = PackedTextDataset(path, 30)
    assert len(dataset) == 6
    for i in range(6):
        sample = dataset[i]["text"]
        assert sample.dtype == torch.int64
        assert sample.tolist() == tokens[30 * i : 30 * i + 31]
    assert dataset[-1]["text"].tolist() == dataset[5]["text"].tolist()
    with pytest.raises(IndexError):
        dataset[6]


@pytest.mark.parametrize(("seq_length", "samples"), [(199, 1), (100, 1), (99, 2), (1, 199)])
def test_every_whole_sample_counts(corpus: Path, tmp_path: Path, seq_length: int, samples: int) -> None:
    assert len(PackedTextDataset(pack(files_of(corpus), ByteTokenizer(), tmp_path / "cache"), seq_length)) == samples


def test_a_range_of_samples(corpus: Path, tmp_path: Path) -> None:
    path = pack(files_of(corpus), ByteTokenizer(), tmp_path / "cache")
    part = PackedTextDataset(path, 10, range(3, 5))
    assert [s["text"].tolist() for s in (part[0], part[1])] == [
        PackedTextDataset(path, 10)[i]["text"].tolist() for i in (3, 4)
    ]
    assert len(PackedTextDataset(path, 10, range(19, 19))) == 0
    with pytest.raises(ValueError, match=re.escape("range(3, 20) goes beyond the 19 samples of 10")):
        PackedTextDataset(path, 10, range(3, 20))


def test_an_opened_dataset_pickles_without_its_tokens(corpus: Path, tmp_path: Path) -> None:
    dataset = PackedTextDataset(pack(files_of(corpus), ByteTokenizer(), tmp_path / "cache"), 10)
    sample = dataset[4]["text"]
    copied = pickle.loads(pickle.dumps(dataset))
    assert "_tokens" in vars(dataset)
    assert "_tokens" not in vars(copied)
    assert copied[4]["text"].tolist() == sample.tolist()


def test_workers_give_what_the_process_gives(corpus: Path, tmp_path: Path) -> None:
    dataset = PackedTextDataset(pack(files_of(corpus), ByteTokenizer(), tmp_path / "cache"), 10)
    alone = first_tokens(DataLoader(dataset, 4))
    assert first_tokens(DataLoader(dataset, 4, num_workers=2)) == alone


def test_dataset_errors(corpus: Path, tmp_path: Path) -> None:
    path = pack(files_of(corpus), ByteTokenizer(), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"200 tokens, and one sample takes seq_length \+ 1 = 201. Use seq_length=199"):
        PackedTextDataset(path, 200)
    with pytest.raises(ValueError, match="seq_length=0"):
        PackedTextDataset(path, 0)


# The data module


def test_split_sizes_and_contents(tmp_path: Path) -> None:
    module = ready(numbered(tmp_path, 2, batch_size=7, split=(0.5, 0.3, 0.2), shuffle=False))
    expected = [95 if i == 13 else i for i in range(120)]
    assert first_tokens(module.train_dataloader()) == expected[:60]
    assert first_tokens(module.val_dataloader()) == expected[60:96]
    assert first_tokens(module.test_dataloader()) == expected[96:]
    assert first_tokens(module.predict_dataloader()) == expected[96:]
    assert next(iter(module.train_dataloader()))["text"].shape == (7, 3)
    assert (module.vocab_size, module.tokenizer.eod_id) == (257, 256)


def test_epochs_differ_and_runs_repeat_under_the_trainer(tmp_path: Path) -> None:
    def run(**kwargs: Any) -> dict[str, list[list[int]]]:
        options = {"batch_size": 50, "split": (0.5, 0.5, 0.0), **kwargs}
        return fit(numbered(tmp_path, 2, **options), tmp_path).seen

    seen = run()
    first, second = seen["train"]
    assert first != second
    assert sorted(first) == sorted(second) == sorted(95 if i == 13 else i for i in range(60))
    assert seen["val"] == [list(range(60, 110)), list(range(110, 120))] * 2
    torch.manual_seed(99)
    assert run() == seen
    assert run(seed=5)["train"][0] != first
    assert run(drop_last=True)["train"] == [first[:50], second[:50]]
    assert run(shuffle=False)["train"][1] == sorted(first, key=lambda t: 13 if t == 95 else t)


class PredictingModel(RecordingModel):
    """Predicts a sample's first token to be what it is."""

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return batch["text"][:, 0]


def test_prediction_runs_over_the_test_split(tmp_path: Path) -> None:
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", devices=1, **options)  # type: ignore[arg-type]
    predicted = trainer.predict(PredictingModel(), numbered(tmp_path, 2, batch_size=7, split=(0.5, 0.4, 0.1)))
    assert torch.cat(predicted).tolist() == list(range(108, 120))  # type: ignore[arg-type]


@pytest.fixture
def process_group() -> Iterator[None]:
    """Takes away what a distributed strategy leaves behind for the tests that come later."""
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_distributed_strategy_changes_nothing_on_one_process(tmp_path: Path) -> None:
    module = numbered(tmp_path, 2, batch_size=50, split=(0.5, 0.5, 0.0))
    alone = fit(module, tmp_path)
    assert fit(numbered(tmp_path, 2, batch_size=50, split=(0.5, 0.5, 0.0)), tmp_path, strategy="ddp").seen == alone.seen


def test_data_parallel_ranks_share_the_samples_and_model_parallel_peers_the_order(tmp_path: Path) -> None:
    def order(rank: int, epoch: int) -> list[int]:
        module = ready(numbered(tmp_path, 2, split=(1.0, 0.0, 0.0)), "fit")
        module.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank})  # type: ignore
        loader = module.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore
        return first_tokens(loader)

    for epoch in (0, 1):
        assert order(0, epoch) == order(0, epoch)
        assert sorted(order(0, epoch) + order(1, epoch)) == sorted(95 if i == 13 else i for i in range(120))
    assert order(0, 0) != order(0, 1)


def test_collators_of_other_families_take_the_samples(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 4)
    spans = SpanCorruptionCollator(sentinel_ids=range(300, 310), seq_length=16, eos_id=256)
    data = TextDataModule(
        tmp_path, seq_length=16, batch_size=3, cache_dir=tmp_path / "cache", split=(0.5, 0.5, 0), collate_fn=spans
    )
    data.prepare_data()
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        for inputs, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            # All that is neither a sentinel nor the end is the sample's 16 tokens.
            assert sum(int((row < 256).sum() - (row < 0).sum()) for row in (inputs, labels)) == 16


def test_no_validation_where_its_part_is_zero(tmp_path: Path) -> None:
    module = numbered(tmp_path, 2, split=(1.0, 0.0, 0.0))
    model = fit(module, tmp_path)
    assert module.val_dataloader() == module.test_dataloader() == []
    assert not model.seen["val"]
    assert len(model.seen["train"]) == 2


def test_standard_library_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = standard_library_sources()[:30]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("lightning_megatron.data.text.datamodule.standard_library_sources", lambda: files)
    module = ready(TextDataModule(split=(1, 0, 0), num_workers=1))
    assert module.cache_dir == tmp_path / "lightning_megatron" / "text"
    batch = next(iter(module.train_dataloader()))["text"]
    text = "".join(file.read_text() for file in files)
    assert module.tokenizer.decode(batch[0].tolist()[:20]) in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seq_length": 0}, "seq_length=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"split": (0.5, 0.5)}, r"split=\(0.5, 0.5\)"),
        ({"split": (0.5, 0.6, 0.1)}, r"split=\(0.5, 0.6, 0.1\)"),
        ({"split": (1.1, -0.1, 0.0)}, r"split=\(1.1, -0.1, 0.0\)"),
    ],
)
def test_argument_errors(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=rf"TextDataModule\({words}\) must be"):
        TextDataModule(**arguments)


@pytest.mark.parametrize(
    ("split", "stage", "words"),
    [
        (
            (0.0, 0.5, 0.5),
            "fit",
            r"train split is empty: 0 of 120 samples of seq_length=2, with split=\(0.0, 0.5, 0.5\)",
        ),
        ((0.996, 0.003, 0.001), "fit", "val split is empty: 0.003 of 120 .*give it 0,"),
        ((0.996, 0.003, 0.001), "validate", "val split is empty: 0.003 of 120 .*part of `split`, lower"),
        ((1.0, 0.0, 0.0), "validate", "val split is empty: 0 of 120"),
        ((1.0, 0.0, 0.0), "test", "test split is empty: 0 of 120"),
        ((1.0, 0.0, 0.0), "predict", "test split is empty: 0 of 120"),
        ((0.5, 0.499, 0.001), None, "test split is empty: 0.001 of 120"),
    ],
)
def test_an_empty_split_is_named(tmp_path: Path, split: Any, stage: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ready(numbered(tmp_path, 2, split=split), stage)


def test_only_the_splits_of_the_stage_must_hold_something(tmp_path: Path) -> None:
    ready(numbered(tmp_path, 2, split=(0.5, 0.499, 0.001)), "fit")
    ready(numbered(tmp_path, 2, split=(0.0, 0.0, 1.0)), "test")


def test_data_module_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"242 tokens, and one sample takes seq_length \+ 1 = 301"):
        ready(numbered(tmp_path, 300))
    module = numbered(tmp_path, 2, batch_size=200, drop_last=True)
    with pytest.raises(RuntimeError, match=r"call `prepare_data\(\)` and `setup\(\)` first"):
        module.train_dataloader()
    with pytest.raises(
        ValueError, match=r"118 training samples give each of 1 data-parallel ranks 118, too few .* 200"
    ):
        ready(module).train_dataloader()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TextDataModule(tmp_path / "none", cache_dir=tmp_path).prepare_data()
    module = TextDataModule(tmp_path / "numbered", 2, cache_dir=tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match=r"elsewhere has no tokens of this text .*call `prepare_data\(\)`"):
        module.setup("fit")
