"""Pre-train a small BERT on Python's source, then train it to tell which package a piece of code is from, on a CPU."""

import argparse
import math
import random
import sysconfig
from collections import Counter
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertTokenizerFast

from lightning_megatron import BertConfig, BertModule, LRSchedule, MegatronStrategy
from lightning_megatron.data import MaskedLMCollator

PACKAGES = ["asyncio", "email", "http", "importlib", "multiprocessing", "unittest", "urllib", "xml"]
SPECIAL = {token: number for number, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}


class Code(LightningDataModule):
    """Pieces of the packages' files, labelled with the number of their package; every fourth file is for validation.

    With ``masked``, the labels are tokens of the piece, which masks replace in the input.
    """

    def __init__(self, args: argparse.Namespace, labelled: int | None = None, masked: bool = False) -> None:
        super().__init__()
        self.args, self.labelled, self.masked = args, labelled, masked
        self.folder = Path(args.output, f"tokenizer-{args.vocab_size}")
        root = Path(sysconfig.get_paths()["stdlib"])
        self.files = [sorted((root / package).rglob("*.py")) for package in args.packages]

    def prepare_data(self) -> None:
        """Train the tokenizer on one process, while the others wait."""
        if not self.folder.exists():
            texts = (file.read_text("utf-8") for files in self.files for file in files)
            blank = BertTokenizerFast(vocab=SPECIAL, do_lower_case=False)
            blank.train_new_from_iterator(texts, self.args.vocab_size, show_progress=False).save_pretrained(self.folder)

    def setup(self, stage: str) -> None:
        """Cut the files into pieces of ``seq_length`` tokens."""
        tokenizer, length = BertTokenizerFast.from_pretrained(self.folder), self.args.seq_length
        cut = {"truncation": True, "max_length": length, "return_overflowing_tokens": True}
        self.train, self.val = [], []
        for label, files in enumerate(self.files):
            parts = [], []
            for number, file in enumerate(files):
                pieces = tokenizer(file.read_text("utf-8"), **cut)["input_ids"]
                samples = [{"input_ids": torch.tensor(x), "labels": label} for x in pieces if len(x) == length]
                parts[number % 4 == 3].extend(samples)
            random.Random(0).shuffle(parts[0])
            self.train += parts[0][: self.labelled]
            self.val += parts[1]
        random.Random(0).shuffle(self.val)
        self.val = self.val[:512]
        self.collate = MaskedLMCollator.from_tokenizer(tokenizer) if self.masked else None

    def train_dataloader(self) -> DataLoader:
        """Batches of the training files, in random order."""
        return DataLoader(self.train, self.args.batch_size, shuffle=True, drop_last=True, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        """Batches of the other files."""
        return DataLoader(self.val, self.args.batch_size, collate_fn=self.collate)


class Classifier(BertModule):
    """Logs ``val_accuracy``, the share of pieces whose package is found."""

    def __init__(self, config: BertConfig, **options: object) -> None:
        super().__init__(config, **options)
        self.accuracy = MulticlassAccuracy(config.num_labels, average="micro")

    def loss(self, output: torch.Tensor, batch: dict) -> object:
        """Return the loss, and log the accuracy during validation."""
        if not self.trainer.training:
            self.accuracy(output.argmax(-1), batch["labels"])
            self.log("val_accuracy", self.accuracy, on_step=False, on_epoch=True)
        return super().loss(output, batch)


def parse() -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--accelerator", default="cpu", help="cpu or gpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--packages", nargs="+", default=PACKAGES, help="packages of the standard library")
    parser.add_argument("--steps", type=int, default=1500, help="steps of pre-training")
    parser.add_argument("--classify-steps", type=int, default=60, help="steps of training the classifier")
    parser.add_argument("--labelled", type=int, default=64, help="pieces of each package that the classifier sees")
    parser.add_argument("--from-scratch", action="store_true", help="train the classifier without pre-training")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--seq-length", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--output", default="checkpoints/bert-stdlib", help="directory for checkpoints and loss curves")
    return parser.parse_args()


def fit(name: str, module: BertModule, data: Code, steps: int, args: argparse.Namespace) -> Trainer:
    """Train for ``steps`` steps; write the curves to ``OUTPUT/NAME/metrics.csv`` and a checkpoint beside them."""
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=MegatronStrategy(tp=args.tp, pp=args.pp),
        max_steps=steps,
        val_check_interval=max(1, steps // 6),
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        enable_checkpointing=False,
        logger=CSVLogger(args.output, name, version=""),
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(Path(args.output, name, "checkpoint"))
    return trainer


def main() -> None:
    """Pre-train, load the weights into a classifier, and train the classifier."""
    args = parse()
    seed_everything(1234)
    sizes = {name: getattr(args, name) for name in ("hidden_size", "vocab_size", "seq_length")}
    sizes |= {"num_layers": 2, "num_attention_heads": 4, "norm_placement": "pre", "num_labels": len(args.packages)}
    sizes["init_method_std"] = args.hidden_size**-0.5  # BERT's 0.02 is for wide models
    options = {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        "lr_schedule": LRSchedule("linear", warmup_fraction=0.1),
    }
    classifier = Classifier(BertConfig(task="sequence_classification", hidden_dropout=0.1, **sizes), **options)
    name = "from-scratch"
    if not args.from_scratch:
        name = "classifier"
        trainer = fit(
            "pretraining", BertModule(BertConfig(**sizes), **options), Code(args, masked=True), args.steps, args
        )
        if trainer.is_global_zero:
            loss, uniform = trainer.callback_metrics["val_mlm_loss"], math.log(args.vocab_size)
            print(f"val_mlm_loss {loss:.3f} (a uniform guess has {uniform:.3f})")
        classifier.load_weights(Path(args.output, "pretraining", "checkpoint"), strict=False)
    data = Code(args, args.labelled)
    trainer = fit(name, classifier, data, args.classify_steps, args)
    if trainer.is_global_zero:
        accuracy = trainer.callback_metrics["val_accuracy"]
        ((_, largest),) = Counter(sample["labels"] for sample in data.val).most_common(1)
        print(f"val_accuracy {accuracy:.3f} (the largest package has {largest / len(data.val):.3f} of the pieces)")


if __name__ == "__main__":
    main()
