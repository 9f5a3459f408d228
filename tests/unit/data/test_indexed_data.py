"""Megatron's indexed data: the files, what the data module reads of them, and every mistake named."""

import gzip
import json
import multiprocessing
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from lightning_megatron.cli.main import main
from lightning_megatron.data import BertSamples, GPTSamples, IndexedDataError, MegatronDataModule, RampUp, T5Samples
from lightning_megatron.data.indexed.files import check_contents, files, open_indexed, writing
from lightning_megatron.data.indexed.samples import LONGEST_SENTENCE
from lightning_megatron.data.indexed.sentences import split_sentences
from lightning_megatron.data.preprocess import preprocess, train_tokenizer
from lightning_megatron.data.text_files import standard_library_sources
from lightning_megatron.data.tokenizers import load_tokenizer
from lightning_megatron.models import row_documents
from lightning_megatron.models.layers.attention_pattern import AttentionPattern
from tests.support.indexed import FIRST, Numbers, make, write
from tests.support.pages import ROOT
from tests.support.preloaded_python import executable
from tests.support.trainer import QUIET

SEQ = 16
pytestmark = pytest.mark.usefixtures("preloaded_python")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache of indices for all tests of this file that do not bring their own."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


def ready(module: MegatronDataModule, stage: str | None = None) -> MegatronDataModule:
    module.prepare_data()
    module.setup(stage)
    return module


def gpt(paths, **options) -> MegatronDataModule:
    chosen = {"batch_size": 4, "tokenizer": Numbers(), "split": "1", **options}
    return MegatronDataModule(paths, chosen.pop("samples", GPTSamples(SEQ)), **chosen)


def batches(loader) -> dict[str, torch.Tensor]:
    found = list(loader)
    return {name: torch.cat([batch[name] for batch in found]) for name in found[0]}


def items(prefix: Path) -> list[list[int]]:
    data = open_indexed(prefix)  # megatron-core closes its files with it, under arrays that still read them
    return [item.tolist() for item in data[:]]


# Writing


def lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("vocab_size", [200, 70_000], ids=["uint16", "int32"])
def test_bytes_are_those_of_megatrons_own_tool(tmp_path, workers, vocab_size):
    """Megatron-LM's tools/preprocess_data.py calls ``add_document`` with a document's ids and its sentences' sizes."""
    tokenizer = Numbers(vocab_size)
    rows = [
        {
            "text": [
                " ".join(str(20 + (d * 7 + s * 3 + i) % 170) for i in range(3 + (d + s) % 5)) for s in range(1 + d % 4)
            ]
        }
        for d in range(120)
    ]
    source = lines(tmp_path / "rows.jsonl", rows)
    (done,) = preprocess(
        [source], tmp_path / "ours", tokenizer, append_eod=True, sentences=True, workers=workers, progress=False
    )
    dtype = np.uint16 if vocab_size == 200 else np.int32
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    tokens = 0
    for row in rows:
        ids, lengths = [], []
        for sentence in row["text"]:
            encoded = tokenizer.encode(sentence)
            ids += encoded
            lengths.append(len(encoded))
        ids.append(tokenizer.eod_id)
        lengths[-1] += 1
        theirs.add_document(ids, lengths)
        tokens += len(ids)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    assert (done.documents, done.tokens, done.empty) == (120, tokens, [])
    check_contents(tmp_path / "ours", open_indexed(tmp_path / "ours"))


def test_keys_empty_documents_and_whole_texts(tmp_path):
    source = lines(
        tmp_path / "rows.jsonl", [{"a": "30 31", "b": "40"}, {"a": "", "b": "41 42"}, {"a": [], "b": ["43", "44"]}]
    )
    text = tmp_path / "one.txt"
    text.write_text("50 51\n52")
    first, second = preprocess([source], tmp_path / "out", Numbers(), json_keys=["a", "b"], progress=False)
    assert str(first) == (
        f"{tmp_path}/out_a: 1 documents, 2 tokens; left out 2 empty documents: {source}:2, {source}:3"
    )
    assert items(tmp_path / "out_b") == [[40], [41, 42], [43, 44]]
    assert second.documents == 3
    preprocess([source, text], tmp_path / "both", Numbers(), json_keys=["b"], append_eod=True, progress=False)
    assert items(tmp_path / "both")[3] == [50, 51, 52, 4]


def test_nothing_is_left_of_a_run_that_failed(tmp_path):
    source = lines(tmp_path / "rows.jsonl", [{"text": "30"}, {"text": "31 999"}])
    with pytest.raises(ValueError, match="rows.jsonl:2 has ids from 31 to 999, outside the vocab_size of 200"):
        preprocess([source], tmp_path / "out", Numbers(), progress=False)
    with pytest.raises(ValueError, match=r"rows.jsonl:1 has no text under 'body', but \['text'\].*--json-keys"):
        preprocess([source], tmp_path / "out", Numbers(), json_keys=["body"], workers=2, progress=False)
    with pytest.raises(ValueError, match="number.jsonl:1: 'text' is int"):
        preprocess([lines(tmp_path / "number.jsonl", [{"text": 3}])], tmp_path / "out", Numbers(), progress=False)
    with pytest.raises(ValueError, match="There is no document to write"):
        preprocess([lines(tmp_path / "none.jsonl", [{"text": ""}])], tmp_path / "out", Numbers(), progress=False)
    with pytest.raises(ValueError, match=r"out.bin' must be the prefix of two files.*leave the ending out"):
        preprocess([source], tmp_path / "out.bin", Numbers(), progress=False)
    (tmp_path / "broken.jsonl").write_text('{"text": "30"}\n{"text": \n')
    with pytest.raises(ValueError, match="broken.jsonl:2 is no JSON"):
        preprocess([tmp_path / "broken.jsonl"], tmp_path / "out", Numbers(), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "broken.jsonl",
        "none.jsonl",
        "number.jsonl",
        "rows.jsonl",
    ]


BAD_ROWS = {
    "surrogate": (rb'{"text": "a \ud800 b"}', r"'text' has \\ud800, half of a surrogate pair"),
    "surrogate in a list": (rb'{"text": ["a", "\udfff"]}', r"'text' has \\udfff"),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), "is no JSON: 'utf-8' codec can't decode byte 0xe9"),
    "raw NUL": (b'{"text": "a\0b"}', "is no JSON: Invalid control character"),
    "NULs": (b"\0\0\0\0", "is no JSON"),
    "cut off": (b'{"text": "a', "is no JSON: Unterminated string"),
    "two on a line": (b'{"text": "a"} {"text": "b"}', "is no JSON: Extra data"),
    "brackets without end": (b"[" * 200_000, "is no JSON"),
    "a list": (b'["text"]', "has no text under 'text', but list"),
    "null": (b"null", "has no text under 'text', but NoneType"),
    "a missing key": (b'{"body": "a"}', r"has no text under 'text', but \['body'\]"),
    "a number": (b'{"text": 1}', "'text' is int"),
    "a list of numbers": (b'{"text": ["a", 1]}', "'text' is list"),
    "a null text": (b'{"text": null}', "'text' is NoneType"),
}


def test_every_bad_row_is_named_by_file_and_line(tmp_path):
    good = b'\xef\xbb\xbf{"text": "\\u0000 \\ud83d\\ude00"}\n'  # a byte order mark, a NUL and a pair are no mistakes
    for name, (row, says) in BAD_ROWS.items():
        source = tmp_path / f"{name}.jsonl"
        source.write_bytes(good + b"\n" + row + b"\n")
        for act in (
            lambda source: preprocess([source], tmp_path / "out", "bytes", progress=False),
            lambda source: train_tokenizer([source], 400, tmp_path / "tokenizer.json"),
        ):
            with pytest.raises(ValueError, match=rf"{re.escape(str(source))}:3:? {says}"):
                act(source)
    (tmp_path / "good.jsonl").write_bytes(good)
    preprocess([tmp_path / "good.jsonl"], tmp_path / "out", "bytes", progress=False)
    assert bytes(items(tmp_path / "out")[0]).decode() == "\0 😀"


def test_a_text_that_the_tokenizer_cannot_take_is_named(tmp_path):
    source = lines(tmp_path / "rows.jsonl", [{"text": "30"}, {"text": "thirty"}])
    for workers in (1, 2):
        with pytest.raises(ValueError, match="rows.jsonl:2 cannot be tokenised: invalid literal"):
            preprocess([source], tmp_path / "out", Numbers(), workers=workers, progress=False)


@pytest.mark.parametrize("cut", [None, 30], ids=["whole", "truncated"])
def test_compressed_files_are_refused(cut, tmp_path):
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "30"}\n' * 9)[:cut])
    with pytest.raises(ValueError, match=r"rows.jsonl.gz is a gzip file and not text. Unpack it first"):
        preprocess([packed], tmp_path / "out", Numbers(), progress=False)


class Dying(Numbers):
    """Kills its process at one text, as the system does where memory runs out."""

    def encode(self, text):
        if text == "66":
            os.kill(os.getpid(), 9)
        return super().encode(text)


def test_a_killed_worker_is_said(tmp_path):
    source = lines(tmp_path / "rows.jsonl", [{"text": str(n)} for n in range(20, 100)])
    with pytest.raises(ChildProcessError, match="was killed, as happens where memory runs out"):
        preprocess([source], tmp_path / "out", Dying(), workers=2, progress=False)


def test_sentences():
    text = 'He said: "Stop!" And so (they say.) it went on... to\nthe end. 你好。再见！\n\nA heading\n\nLast'
    assert split_sentences(text) == [
        'He said: "Stop!"',
        "And so (they say.)",
        "it went on...",
        "to\nthe end.",
        "你好。",
        "再见！",
        "A heading",
        "Last",
    ]
    assert split_sentences(" \n ") == []


def test_long_sentences_are_cut_for_megatron(tmp_path):
    source = lines(tmp_path / "rows.jsonl", [{"text": " ".join(["30"] * 1200) + ". 31"}])

    class Words(Numbers):
        def encode(self, text):
            return super().encode(text.replace(".", ""))

    preprocess([source], tmp_path / "out", Words(), append_eod=True, sentences=True, progress=False)
    assert list(map(len, items(tmp_path / "out"))) == [511, 511, 178, 2]


def test_the_command_on_the_standard_library(tmp_path):
    """A real process, on real text, with a tokenizer that it trains, and two workers."""
    library = Path(json.__file__).parent
    command = "from lightning_megatron.cli.main import main; main()"
    options = ["--out", "data/code", "--train-bpe", "700", "--append-eod", "--split-sentences", "--workers", "2"]
    done = subprocess.run(
        [executable(), "-c", command, "preprocess", str(library), str(library.parent / "email"), *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(tmp_path / "data/code.tokenizer.json")
    assert tokenizer.vocab_size == 700
    sources = [f for f in standard_library_sources() if f.parts[: len(library.parts)] == library.parts]
    data = open_indexed(tmp_path / "data/code")
    check_contents(tmp_path / "data/code", data)
    assert f"{len(data.document_indices) - 1} documents" in done.stdout
    first = [data[i].tolist() for i in range(int(data.document_indices[1]))]
    assert first[-1].pop() == tokenizer.eod_id
    assert " ".join(map(tokenizer.decode, first)).split() == sources[0].read_text().split()
    assert "100%" in done.stderr
    samples = T5Samples(32)
    module = MegatronDataModule(
        tmp_path / "data/code", samples, tokenizer=tmp_path / "data/code.tokenizer.json", batch_size=2, split="9,1"
    )
    assert next(iter(ready(module).train_dataloader()))["text_enc"].shape == (2, 32)


def test_the_command_names_mistakes(tmp_path):
    with pytest.raises(SystemExit, match="nowhere does not exist"):
        main(["preprocess", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")])
    text = tmp_path / "a.txt"
    text.write_text("x")
    with pytest.raises(SystemExit, match="--workers 0: use 1 or more"):
        main(["preprocess", str(text), "--out", str(tmp_path / "x"), "--workers", "0"])
    with pytest.raises(SystemExit, match="--train-bpe 400 makes a tokenizer, and --tokenizer"):
        main(["preprocess", str(text), "--out", str(tmp_path / "x"), "--train-bpe", "400", "--tokenizer", "t.json"])
    with pytest.raises(
        SystemExit, match=r"vocab_size=300 .*and 104 special tokens \(.PAD. to <extra_id_99>\). Use 361"
    ):
        main(["preprocess", str(text), "--out", str(tmp_path / "x"), "--train-bpe", "300"])


def test_the_command_takes_inputs_behind_its_options_and_tells_defaults(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a": "one", "b": "two"}\n')
    main(["preprocess", "--out", str(tmp_path / "x"), "--json-keys", "a,b", str(rows)])
    assert [len(open_indexed(tmp_path / name)) for name in ("x_a", "x_b")] == [1, 1]
    with pytest.raises(SystemExit):
        main(["preprocess", str(rows), "--out", str(tmp_path / "x"), "--suffixes", ","])
    assert "',' names nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["preprocess", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for default in ("bytes", "text", "1", ".txt,.md,.py,.jsonl"):
        assert f"(default: {default})" in told


# Files that are not what they should be


def corrupt(prefix: Path, how: str) -> None:
    bin_path, idx_path = files(prefix)
    front = idx_path.read_bytes()
    if how == "no index":
        idx_path.unlink()
    elif how == "short index":
        idx_path.write_bytes(front[:-9])
    elif how == "very short index":
        idx_path.write_bytes(front[:20])
    elif how == "other index":
        idx_path.write_bytes(b"GARBAGE" + front[7:])
    elif how == "short data":
        bin_path.write_bytes(bin_path.read_bytes()[:-4])
    elif how == "empty document":
        lengths = np.frombuffer(front, np.int32, 30, 34).copy()
        lengths[8] += lengths[7]
        lengths[7] = 0
        idx_path.write_bytes(front[:34] + lengths.tobytes() + front[34 + lengths.nbytes :])
    elif how == "places":
        places = np.frombuffer(front, np.int64, 30, 34 + 120).copy()
        places[9] += 2
        idx_path.write_bytes(front[: 34 + 120] + places.tobytes() + front[34 + 120 + 240 :])
    elif how == "documents":
        bounds = np.frombuffer(front, np.int64, 31, 34 + 360).copy()
        bounds[9] = bounds[8]
        idx_path.write_bytes(front[: 34 + 360] + bounds.tobytes())


MISTAKES = {
    "no index": r"There is no .*data.idx .*preprocess. makes them",
    "short index": r"data.idx has \d+ bytes, and 30 items in 30 documents take \d+: it is cut short",
    "very short index": r"data.idx is no index of Megatron's: it begins with b'MMIDIDX",
    "other index": r"data.idx is no index of Megatron's: it begins with b'GARBAGE",
    "short data": r"data.bin has \d+ bytes, and by data.idx it should have \d+",
    "empty document": r"data.idx: item 7 has 0 tokens: document 7 is empty",
    "places": r"data.idx: its items do not stand one behind another",
    "documents": r"data.idx: document 8 is empty",
}


@pytest.mark.parametrize("how", MISTAKES)
def test_corrupt_files_are_named_before_the_first_step(tmp_path, how):
    corrupt(write(tmp_path / "data", 30), how)
    model = BoringModel()
    model.training_step = lambda *_: pytest.fail("a step was made")  # type: ignore[method-assign]
    run = Trainer(accelerator="cpu", max_steps=2, **QUIET)
    with pytest.raises(IndexedDataError, match=MISTAKES[how]):
        run.fit(model, datamodule=gpt(tmp_path / "data"))


def test_a_path_with_its_ending(tmp_path):
    with pytest.raises(IndexedDataError, match="Leave the ending out"):
        ready(gpt(write(tmp_path / "data", 3).with_suffix(".bin")))


# What is read


def test_gpt_reads_each_sample_once_over_replicas_and_epochs(tmp_path):
    """Every token has an id of its own, so what was read can be counted."""
    with writing(tmp_path / "data", 30_000) as writer:
        ids = iter(range(FIRST, 30_000))
        for document in range(100):
            writer.add([[next(ids) for _ in range(30 + document)]])
    tokens = next(ids) - FIRST
    samples = (tokens - 1) // SEQ

    class Replica:
        max_steps, accumulate_grad_batches, limit_train_batches, limit_val_batches, limit_test_batches = (
            -1,
            1,
            1.0,
            1.0,
            1.0,
        )
        state = type("State", (), {"fn": None})()

        def __init__(self, rank):
            self.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}

    epochs = []
    for epoch in range(2):
        read = []
        for rank in range(2):
            module = gpt(tmp_path / "data", tokenizer=Numbers(30_000), batch_size=1)
            module.trainer = Replica(rank)
            loader = ready(module).train_dataloader()
            loader.sampler.set_epoch(epoch)
            read.append(batches(loader)["labels"])
        counts = Counter(torch.cat(read).flatten().tolist())
        assert set(counts.values()) == {1}
        assert len(counts) == samples // 2 * 2 * SEQ  # what does not fill a batch on each replica is left out
        epochs.append(torch.cat(read))
    assert not torch.equal(*epochs)  # another order


def test_a_run_reads_on_through_the_data(tmp_path):
    """70 samples of 16, of data that has 520 tokens: two passes, some of a third, and no more than asked for."""
    with writing(tmp_path / "data", 200 + 520) as writer:
        ids = iter(range(200, 200 + 520))
        for _ in range(20):
            writer.add([[next(ids) for _ in range(26)]])

    def labels(**options) -> torch.Tensor:
        module = gpt(tmp_path / "data", tokenizer=Numbers(720), train_samples=70, batch_size=1, **options)
        return batches(ready(module).train_dataloader())["labels"]

    read = labels()
    counts = Counter(read.flatten().tolist())
    assert read.shape == (70, SEQ)
    # The very first token is no label, and the sample over the end of the second pass is shuffled among the third's.
    assert sum(count >= 2 for count in counts.values()) >= 520 - 1 - SEQ
    assert sum(count == 3 for count in counts.values()) >= 70 * SEQ - 2 * 520
    assert max(counts.values()) == 3
    assert torch.equal(read, labels())
    assert not torch.equal(read, labels(seed=5))


def test_the_samples_are_megatrons(tmp_path):
    """Against ``GPTDataset`` as Megatron-LM builds it, in a process group of one."""
    import torch.distributed as dist
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    path = str(write(tmp_path / "data", 60))
    tokenizer = Numbers()
    tokenizer.eod, tokenizer.pad, tokenizer.unique_identifiers = 4, 0, {"class": "Numbers"}
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQ,
        blend=([path], None),
        split="8,1,1",
        path_to_cache=str(tmp_path / "theirs"),
        tokenizer=tokenizer,
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        theirs, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [50, None, None], lambda: True, config).build()
    finally:
        dist.destroy_process_group()
    samples = GPTSamples(SEQ, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    ours = ready(gpt(path, samples=samples, split="8,1,1", train_samples=50, batch_size=1)).train_dataloader()
    for batch, sample in zip(ours, (theirs[i] for i in range(50)), strict=True):
        mask = sample.pop("attention_mask")
        documents = row_documents.numbers(batch, SEQ)
        assert torch.equal(AttentionPattern(length=SEQ, documents=documents).dense(None, mask.device)[0], mask)
        assert batch.keys() == sample.keys()
        for name, value in sample.items():
            assert torch.equal(batch[name][0], value), name
    everything = batches(ours)
    assert (everything["position_ids"][:, 1:] == 0).any()
    assert not everything["loss_mask"].all()


def test_blends_keep_their_proportions(tmp_path):
    paths = [write(tmp_path / name, 90, vocab_size=size) for name, size in (("a", 60), ("b", 120), ("c", 200))]
    owner = {}
    for number, (low, high) in enumerate(((FIRST, 60), (60, 120), (120, 200))):
        owner.update(dict.fromkeys(range(low, high), number))
    for number, path in enumerate(paths):  # ids that tell which data they are from
        low = (FIRST, 60, 120)[number]
        with writing(tmp_path / f"own_{number}", 200) as writer:
            for item in items(path):
                writer.add([[low + id_ % 40 for id_ in item]])
    blended = gpt([tmp_path / f"own_{n}" for n in range(3)], weights=[5, 3, 2], train_samples=400, batch_size=1, seed=3)
    tokens = batches(ready(blended).train_dataloader())["tokens"]
    counts = Counter(owner[int(row[0])] for row in tokens)
    assert [counts[n] for n in range(3)] == [200, 120, 80]
    # At any point, too: a blend is no sequence of parts. megatron-core's greedy rule keeps each within one sample.
    for n in range(1, 400, 37):
        begun = Counter(owner[int(row[0])] for row in tokens[:n])
        assert [begun[i] for i in range(3)] == pytest.approx([n * 0.5, n * 0.3, n * 0.2], abs=1.01)
    without = ready(gpt([tmp_path / f"own_{n}" for n in range(3)], batch_size=1)).train_dataloader()
    alone = sum(len(ready(gpt(tmp_path / f"own_{n}", batch_size=1)).train_dataloader()) for n in range(3))
    assert len(without) == alone
    assert len({tuple(row) for row in batches(without)["labels"].tolist()}) == alone


def test_a_blend_is_evaluated_in_proportion_where_batches_are_counted(tmp_path):
    """``limit_val_batches`` as Lightning means it: a number of batches, or a share of the data, each sample once."""
    both = [write(tmp_path / "a", 100), write(tmp_path / "b", 50)]

    def validation(**limits) -> list[int]:
        seen = []

        class Reader(BoringModel):
            def training_step(self, batch, batch_idx):
                return self.layer(torch.ones(1, 32)).sum()

            def validation_step(self, batch, batch_idx):
                seen.append(len(batch["tokens"]))

        module = gpt(both, weights=[1, 3], split="8,2", batch_size=2)
        run = Trainer(accelerator="cpu", max_steps=2, val_check_interval=2, num_sanity_val_steps=0, **limits, **QUIET)
        run.fit(Reader(), datamodule=module)
        return [sum(seen), *(sum(1 for i in module._dataset("val").dataset.dataset_index if i == n) for n in range(2))]

    alone = [len(ready(gpt(path, split="8,2")).val_dataloader().dataset) for path in both]
    assert validation(limit_val_batches=6) == [12, 3, 9]
    assert validation() == [sum(alone), *alone]


def test_splits_do_not_overlap(tmp_path):
    with writing(tmp_path / "data", 30_000) as writer:
        ids = iter(range(FIRST, 30_000))
        for _ in range(100):
            writer.add([[next(ids) for _ in range(40)]])
    module = ready(gpt(tmp_path / "data", tokenizer=Numbers(30_000), split="80,15,5", batch_size=1))
    loaders = [module.train_dataloader(), module.val_dataloader(), module.test_dataloader()]
    seen = [set(batches(loader)["labels"].flatten().tolist()) for loader in loaders]
    assert [len(tokens) // SEQ for tokens in seen] == [(n * 40 - 1) // SEQ for n in (80, 15, 5)]
    assert max(seen[0]) < min(seen[1])
    assert max(seen[1]) < min(seen[2])
    assert batches(module.predict_dataloader())["labels"].shape[0] == 12


def test_bert_and_t5_read_each_sentence_once(tmp_path):
    with writing(tmp_path / "data", 20_000) as writer:
        ids = iter(range(FIRST, 20_000))
        for document in range(40):
            writer.add([[next(ids) for _ in range(4 + (document + s) % 5)] for s in range(5)])
    last = next(ids)
    tokenizer = Numbers(20_000)
    options = {"short_sequence_probability": 0.0}
    bert = MegatronDataModule(
        tmp_path / "data", BertSamples(64, **options), tokenizer=tokenizer, batch_size=1, split="1"
    )
    found = batches(ready(bert).train_dataloader())
    original = torch.where(found["labels"] >= 0, found["labels"], found["text"])[found["padding_mask"] > 0]
    assert Counter(original[original >= FIRST].tolist()) == Counter(range(FIRST, last))
    assert not found["text"][found["padding_mask"] == 0].any()
    assert not found["types"][found["padding_mask"] == 0].any()
    assert float(found["is_random"].float().mean()) == pytest.approx(0.5, abs=0.35)  # 40 samples
    chosen = (found["labels"] >= 0).sum() / (found["padding_mask"].sum())
    assert float(chosen) == pytest.approx(0.15, abs=0.02)
    t5 = MegatronDataModule(tmp_path / "data", T5Samples(64, **options), tokenizer=tokenizer, batch_size=1, split="1")
    found = batches(ready(t5).train_dataloader())
    both = torch.cat([found["text_enc"].flatten(), found["labels"].flatten()])
    assert Counter(both[both >= FIRST].tolist()) == Counter(range(FIRST, last))
    for row in range(len(found["labels"])):
        labels, inputs = found["labels"][row], found["text_dec"][row]
        real = int((labels >= 0).sum())
        assert inputs[0] == 0  # the padding: the decoder's start
        assert torch.equal(inputs[1:real], labels[: real - 1])
        assert int(found["decoder_attention_mask"][row].sum()) == real
        assert labels[real - 1] == 4  # [EOS]
        assert (labels[real:] == -100).all()


def test_one_megatron_datasets_samples_are_read_with_workers(tmp_path):
    write(tmp_path / "sentences", 60, sentences=5, eod=False)
    alone = batches(ready(make("bert", tmp_path, train_samples=40)).train_dataloader())
    workers = batches(ready(make("bert", tmp_path, train_samples=40, num_workers=2)).train_dataloader())
    assert all(torch.equal(alone[name], workers[name]) for name in alone)


# The cache


def _build(folder: str, barrier) -> list[list[int]]:
    module = make("gpt", folder, train_samples=64)
    barrier.wait()
    return batches(ready(module).train_dataloader())["tokens"].tolist()


def _race(folder: str, number: int, barrier) -> None:
    torch.save(_build(folder, barrier), f"{folder}/{number}.pt")


@pytest.mark.slow
def test_two_processes_that_build_at_once_leave_one_right_cache(tmp_path):
    write(tmp_path / "gpt", 90, vocab_size=64)
    context = multiprocessing.get_context("forkserver")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_race, args=(str(tmp_path), n, barrier)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{n}.pt") for n in range(2))
    assert first == second
    left = list((tmp_path / "cache").iterdir())
    assert len(left) == 3  # one for each part of the split, and no temporary ones
    assert not [path for path in left if path.name.startswith(".")]
    assert {len(list(path.iterdir())) for path in left} == {4}  # three indices and what they are of
    shutil.rmtree(tmp_path / "cache")
    assert batches(ready(make("gpt", tmp_path, train_samples=64)).train_dataloader())["tokens"].tolist() == first


def test_other_data_have_other_indices(tmp_path):
    """megatron-core's own names tell only of the path: it would read the new data by the old lengths."""
    write(tmp_path / "data", 60)
    before = len(ready(gpt(tmp_path / "data")).train_dataloader())
    write(tmp_path / "data", 120)
    assert len(ready(gpt(tmp_path / "data")).train_dataloader()) > before


def test_a_broken_cache_is_named(tmp_path):
    write(tmp_path / "gpt", 90, vocab_size=64)
    module = make("gpt", tmp_path, split="1")
    with pytest.raises(RuntimeError, match=r"has no indices of .*call `prepare_data\(\)`"):
        module.setup()
    module.prepare_data()
    (shuffle,) = (tmp_path / "cache").glob("*/*shuffle_index.npy")
    shuffle.write_bytes(shuffle.read_bytes()[:-50])
    with pytest.raises(RuntimeError, match="cannot be read: .*Remove the folder"):
        module.setup()


def test_without_the_compiled_helper(tmp_path):
    """All else imports and works; what needs it says so."""
    write(tmp_path / "gpt", 90, vocab_size=64)
    script = f"""
import sys
sys.modules["megatron.core.datasets.helpers_cpp"] = None
from tests.support.indexed import make
from tests.support.pages import ROOT
make("gpt", {str(tmp_path)!r}).prepare_data()
"""
    done = subprocess.run([executable(), "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "RuntimeError: megatron-core is installed without its compiled helper" in done.stderr
    assert "pip install --force-reinstall" in done.stderr


def test_megatron_leaves_out_documents_with_long_sentences():
    """What ``LONGEST_SENTENCE`` says of its C++."""
    from megatron.core.datasets import helpers

    def samples(longest: int) -> int:
        bounds, sizes = np.array([0, 2, 4], np.int64), np.array([longest, 3, 4, 5], np.int32)
        return len(helpers.build_mapping(bounds, sizes, 1, 10, 600, 0.0, 1, False, 1))

    assert (samples(LONGEST_SENTENCE), samples(LONGEST_SENTENCE + 1)) == (2, 1)


def test_the_command_line_of_lightning():
    module = LightningCLI(
        BoringModel,
        MegatronDataModule,
        run=False,
        save_config_callback=None,
        args=[
            "--data.paths=[a,b]",
            "--data.weights=[0.3,0.7]",
            "--data.samples=lightning_megatron.data.T5Samples",
            "--data.samples.seq_length=64",
            "--data.global_batch_size=4",
        ],
    ).datamodule
    assert (module.paths, module.weights, module.samples.decoder_seq_length) == (["a", "b"], [0.3, 0.7], 24)


# Under other strategies, and mistakes


def test_a_plain_trainer_reads_the_same(tmp_path):
    """Lightning's own single-device strategy: no process group, which megatron-core's builders want."""
    write(tmp_path / "sentences", 60, sentences=5, eod=False)

    class Reader(BoringModel):
        def __init__(self):
            super().__init__()
            self.read = {"train": [], "val": []}

        def training_step(self, batch, batch_idx):
            self.read["train"].append(batch["text"])
            return self.layer(torch.ones(1, 32)).sum()

        def validation_step(self, batch, batch_idx):
            self.read["val"].append(batch["text"])

    model = Reader()
    run = Trainer(accelerator="cpu", max_steps=5, accumulate_grad_batches=2, num_sanity_val_steps=0, **QUIET)
    run.fit(model, datamodule=make("bert", tmp_path))
    assert [len(rows) for rows in model.read["train"]] == [8] * 10
    by_hand = batches(ready(make("bert", tmp_path, train_samples=80)).train_dataloader())["text"]
    assert torch.equal(torch.cat(model.read["train"]), by_hand)
    assert len(torch.cat(model.read["val"])) == len(
        ready(make("bert", tmp_path, train_samples=80)).val_dataloader().dataset
    )


def test_refusals(tmp_path):
    write(tmp_path / "a", 30)
    write(tmp_path / "b", 30)
    both = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ValueError, match=r"weights=\[0.3\]\): 2 paths take 2 weights"):
        gpt(both, weights=[0.3])
    with pytest.raises(ValueError, match=r"weights=\[0.3, 0\]\): 2 paths take 2 weights, all above 0"):
        gpt(both, weights=[0.3, 0])
    with pytest.raises(ValueError, match="names a path twice"):
        gpt([both[0], both[0]])
    with pytest.raises(ValueError, match=r"paths=\[\]"):
        gpt([])
    for split in ("", "1,2,3,4", "-1,2", "0,0", "a,b", (0.9, 0.1)):
        with pytest.raises(ValueError, match="must be a text of up to three weights"):
            gpt(both, split=split)
    with pytest.raises(ValueError, match="give one of the two"):
        gpt(both, global_batch_size=8)
    with pytest.raises(ValueError, match="train_samples=0"):
        gpt(both, train_samples=0)
    with pytest.raises(TypeError, match="use GPTSamples"):
        MegatronDataModule(both, "gpt", batch_size=1)
    with pytest.raises(ValueError, match="with weights, some data is read more often"):
        ready(gpt(both, weights=[1, 2]))
    with pytest.raises(ValueError, match="the val part of .*a has no sample.*its 0 of 30 documents have 0 tokens"):
        ready(gpt(both, split="9999,1"))
    with pytest.raises(ValueError, match="too few for one batch of 500"):
        ready(gpt(both, batch_size=500)).train_dataloader()
    with pytest.raises(ValueError, match="needs a number of samples over which batches"):
        ready(gpt(both, ramp_up=RampUp(1, 1, 10))).train_dataloader()
    with pytest.raises(RuntimeError, match="has no train data yet"):
        gpt(both).train_dataloader()


def test_refusals_of_samples(tmp_path):
    write(tmp_path / "whole", 30, eod=False)
    options = {"tokenizer": Numbers(), "batch_size": 1, "split": "1"}
    with pytest.raises(ValueError, match="none has 2 sentences; make the data with .*--split-sentences"):
        ready(MegatronDataModule(tmp_path / "whole", BertSamples(32), **options))
    with writing(tmp_path / "long", 200) as writer:
        writer.add([[30] * 600, [31]])
    with pytest.raises(ValueError, match="a sentence of more than 512 tokens"):
        ready(MegatronDataModule(tmp_path / "long", T5Samples(32), **options))
    with pytest.raises(ValueError, match="15 sentinels, and a sample can have 27 spans. Add the tokens <extra_id_0>"):
        ready(MegatronDataModule(tmp_path / "whole", T5Samples(256), **options))
    with pytest.raises(ValueError, match="ByteTokenizer has none"):
        ready(MegatronDataModule(tmp_path / "whole", T5Samples(32), batch_size=1, split="1"))
    tokenizer = Numbers()
    del tokenizer.vocabulary["[MASK]"]
    with pytest.raises(ValueError, match=r"lacks a 'mask' token: none of \[MASK\]"):
        ready(
            MegatronDataModule(
                tmp_path / "whole", BertSamples(32, binary_head=False), **{**options, "tokenizer": tokenizer}
            )
        )
    with pytest.raises(ValueError, match="decoder_seq_length=8.*up to 5 of seq_length="):
        T5Samples(32, decoder_seq_length=8)
    for wrong in ({"seq_length": 4}, {"masking_probability": 0}, {"short_sequence_probability": 2}, {"max_ngram": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BertSamples(**{"seq_length": 32, **wrong})
    other = Numbers()
    other.vocabulary.pop("199")
    module = ready(
        MegatronDataModule(tmp_path / "whole", BertSamples(32, binary_head=False), **{**options, "tokenizer": other})
    )
    with pytest.raises(ValueError, match=r"Sample \d+ of .*whole cannot be made \(KeyError\(.*199"):
        list(module.train_dataloader())


def test_a_tokenizer_trained_for_bert_and_t5(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some text, and more text")
    tokenizer = load_tokenizer(train_tokenizer([text], 370, tmp_path / "t.json"))
    assert T5Samples(512).tokenizer_fields(tokenizer)["additional_special_tokens_ids"] == list(range(5, 105))
    assert BertSamples(512).tokenizer_fields(tokenizer)["mask"] == 4
    assert tokenizer.decode(tokenizer.encode("some text")) == "some text"
