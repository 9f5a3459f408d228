"""Indexed data of known tokens, and runs that read them."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_megatron.data import BertSamples, GPTSamples, MegatronDataModule, T5Samples
from lightning_megatron.data.indexed.files import writing
from tests.reference.parallel_bert import LoadedBert
from tests.reference.parallel_gpt import LoadedGPT
from tests.reference.parallel_t5 import LoadedT5
from tests.reference.plain_gpt import GPT2
from tests.support.layout import Layout
from tests.support.trainer import trainer


class Numbers:
    """A tokenizer whose documents are written as numbers; all of BERT's and T5's tokens, then words."""

    special = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[EOS]", *(f"<extra_id_{n}>" for n in range(15)))

    def __init__(self, vocab_size: int = 200) -> None:
        self.vocab_size = vocab_size
        self.eod_id = 4
        self.identity = f"numbers:{vocab_size}"
        words = [f"{'##' if n % 4 == 0 else ''}{n}" for n in range(len(self.special), vocab_size)]
        self.vocabulary = {token: id_ for id_, token in enumerate([*self.special, *words])}

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


FIRST = len(Numbers.special)


def write(prefix: Path, documents: int, vocab_size: int = 200, sentences: int = 1, eod: bool = True) -> Path:
    """Documents of different lengths, of random tokens; the same ones for the same sizes."""
    g = torch.Generator().manual_seed(documents + sentences)
    with writing(prefix, vocab_size) as writer:
        for document in range(documents):
            lengths = [5 + (document + sentence) % 9 for sentence in range(sentences)]
            items = [torch.randint(FIRST, vocab_size, (length,), generator=g).tolist() for length in lengths]
            if eod:
                items[-1].append(4)
            writer.add(items)
    return prefix


def make(kind: str, folder: str | Path, **options: Any) -> MegatronDataModule:
    """A data module over ``folder``'s data for the tests' small models."""
    samples = options.pop("samples", {"gpt": GPTSamples(16), "bert": BertSamples(32), "t5": T5Samples(32)}[kind])
    path = Path(folder) / ("gpt" if kind == "gpt" else "sentences")
    tokenizer = Numbers(64 if kind == "gpt" else 200)
    chosen = {"split": "8,1,1", "cache_dir": Path(folder) / "cache", "global_batch_size": 8, **options}
    return MegatronDataModule(path, samples, tokenizer=tokenizer, **chosen)


def write_all(folder: Path) -> None:
    write(folder / "gpt", 90, vocab_size=64)
    write(folder / "sentences", 60, sentences=5, eod=False)


MODULES = {"gpt": lambda: LoadedGPT(GPT2), "bert": lambda: LoadedBert("pretraining"), "t5": lambda: LoadedT5("t5")}


class Seen(Callback):
    """Keeps losses, and the first tokens of each batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.batches: list[list[list[int]]] = []
        self.evaluated: list[float] = []

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.losses.append(float(run.callback_metrics["train_loss"]))
        tokens = next(batch[key] for key in ("tokens", "input_ids", "text_enc") if key in batch)
        self.batches.append(tokens.tolist())

    def on_validation_end(self, run: Any, module: Any) -> None:
        self.evaluated.append(float(run.callback_metrics["val_loss"]))


def train(kind: str, folder: str, layout: Layout, steps: int, **options: Any) -> dict[str, Any]:
    """Train on this rank, and validate at the end."""
    seen = Seen()
    run = trainer(
        layout, max_steps=steps, val_check_interval=steps, num_sanity_val_steps=0, callbacks=[seen], **options
    )
    run.fit(MODULES[kind](), datamodule=make(kind, folder))
    tested = run.test(run.lightning_module, datamodule=make(kind, folder), verbose=False)
    return {"losses": seen.losses, "batches": seen.batches, "val": seen.evaluated, "test": tested[0]["test_loss"]}
