"""Train a small T5 to restore corrupted pieces of Python's source, with one pipeline stage for each stack, on a CPU."""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lightning_megatron import LRSchedule, MegatronStrategy, ParameterGroups, T5Config, T5Module
from lightning_megatron.data import SpanCorruptionCollator, standard_library_sources
from lightning_megatron.data.preprocess import train_tokenizer


class CorruptedCode(LightningDataModule):
    """Pieces of text files in which sentinels replace spans, with the whole pieces as labels.

    Every tenth file is for validation.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.vocab_size, self.seq_length, self.batch_size = args.vocab_size, args.seq_length, args.batch_size
        self.files = sorted(Path(args.text).rglob("*.py")) if args.text else standard_library_sources()
        self.path = Path(args.output, f"tokenizer-{args.vocab_size}.json")

    def prepare_data(self) -> None:
        """Train the tokenizer on one process, while the others wait."""
        if not self.path.exists():
            train_tokenizer(self.files, self.vocab_size, self.path)

    def setup(self, stage: str) -> None:
        """Cut the files into pieces of ``seq_length`` tokens."""
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(self.path), pad_token="[PAD]", eos_token="<|endoftext|>"
        )
        self.corrupt = SpanCorruptionCollator.from_tokenizer(self.tokenizer, self.seq_length, mean_span_length=2)
        self.train, self.val = [], []
        for number, file in enumerate(self.files):
            ids = torch.tensor(self.tokenizer(file.read_text("utf-8", "replace"), verbose=False)["input_ids"])
            pieces = [{"input_ids": piece} for piece in ids.split(self.seq_length) if len(piece) == self.seq_length]
            (self.val if number % 10 == 9 else self.train).extend(pieces)

    def collate(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return a batch whose labels are the whole pieces, from which a small model learns sooner where to attend."""
        whole = torch.stack([sample["input_ids"] for sample in samples])
        return {**self.corrupt(samples), "labels": F.pad(whole, (0, 1), value=self.tokenizer.eos_token_id)}

    def train_dataloader(self) -> DataLoader:
        """Batches of the training files, in random order."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        """Batches of the other files."""
        return DataLoader(self.val, self.batch_size, collate_fn=self.collate)


def restore(trainer: Trainer, module: T5Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what the model generates from the inputs of a batch, by greedy decoding: token ids ``[b, sd]``."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ids = torch.full((len(batch["labels"]), 1), module.config.decoder_start_id)
    for _ in range(batch["labels"].size(1)):
        rows = {**inputs, "decoder_input_ids": ids}
        samples = [{name: value[row] for name, value in rows.items()} for row in range(len(ids))]
        (logits,) = trainer.predict(module, DataLoader(samples, len(ids)))  # [b, s, vocab], on every rank
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, 1:]


def main() -> None:
    """Parse the options, train and save the model, and show some pieces as the model restores them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--accelerator", default="cpu", help="cpu or gpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--text", help="a folder with .py files; by default the standard library")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=400)
    parser.add_argument("--seq-length", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--output", default="checkpoints/t5-stdlib", help="directory for checkpoint and loss curves")
    args = parser.parse_args()

    seed_everything(1234)
    data = CorruptedCode(args)
    config = T5Config(
        num_layers=2,
        hidden_size=args.hidden_size,
        num_attention_heads=4,
        vocab_size=args.vocab_size,
        seq_length=args.seq_length,
        decoder_seq_length=args.seq_length + 1,  # one more for the end-of-text token
        activation="geglu_tanh",  # as in T5 1.1
        tie_embeddings=False,  # likewise
        init_method_std=args.hidden_size**-0.5,  # 0.02 is for wide models
        extra={"embedding_init_method_std": 1.0},  # as in T5
    )
    module = T5Module(
        config,
        # Adam's steps all have the same size, and the position bias has farther to go than other weights.
        ParameterGroups(
            lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
            scale_lr=["*relative_attention_bias*"],
            lr_mult=30,
        ),
        lr_schedule=LRSchedule("linear", warmup_fraction=0.1),
    )
    machine = {"accelerator": args.accelerator, "devices": args.devices}
    trainer = Trainer(
        **machine,
        strategy=MegatronStrategy(tp=args.tp, pp=args.pp),
        max_steps=args.steps,
        val_check_interval=max(1, args.steps // 6),
        check_val_every_n_epoch=None,
        limit_val_batches=8,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        enable_checkpointing=False,
        logger=CSVLogger(args.output, "denoising", version=""),
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(Path(args.output, "denoising", "checkpoint"))
    loss = trainer.callback_metrics["val_loss"]

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    predictor = Trainer(**machine, strategy=MegatronStrategy(tp=args.tp, pp=args.pp), **quiet)
    batch = data.collate(data.val[:: max(1, len(data.val) // 8)][:8])
    restored = restore(predictor, module, batch)
    if trainer.is_global_zero:
        shown = {"corrupted": batch["input_ids"], "whole": batch["labels"], "restored": restored}
        for rows in zip(*shown.values(), strict=True):
            for name, ids in zip(shown, rows, strict=True):
                print(f"--- {name}\n{data.tokenizer.decode(ids)}")
        print(f"val_loss {loss:.3f} (a uniform guess has {math.log(args.vocab_size):.3f}), checkpoint in {args.output}")


if __name__ == "__main__":
    main()
