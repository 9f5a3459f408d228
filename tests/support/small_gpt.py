"""Runs of a small GPT that checkpoints are written and read by."""

import os
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from megatron.core import dist_checkpointing
from torch.utils.data import DataLoader

from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.layout import Layout
from tests.support.trainer import trainer

SMALL = plain_gpt.replace(plain_gpt.GPT2, num_layers=2, vocab_size=61)


def fit(layout=None, steps=2, load=None, callbacks=(), module=None, precision="32-true", strategy=None, **options):
    layout = layout or Layout()
    module = module or LoadedGPT(SMALL)
    options = {
        "max_steps": steps,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **options,
    }
    run = trainer(layout, strategy, precision, callbacks=list(callbacks), max_epochs=-1, **options)
    run.fit(module, DataLoader(Rows(text_samples(SMALL, 48)), batch_size=4), ckpt_path=load)
    return run, module


def save(layout, path, precision="32-true", weights_only=False, steps=2):
    run, _ = fit(layout, steps, precision=precision)
    run.save_checkpoint(path, weights_only=weights_only)


def validation_data():
    return DataLoader(Rows(text_samples(SMALL, 8)), batch_size=4)


def stock_tensors(path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return dist_checkpointing.load_plain_tensors(f"{path}/weights")


def spoil(path: Path, how: str) -> str:
    name = "weights/__1_0.distcp"
    file = path / name
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "flipped":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "manifest":
        (path / "manifest.json").write_text((path / "manifest.json").read_text().replace("crc32", "crc23", 1))
        return "manifest.json is damaged"
    else:
        (path / "manifest.json").unlink()
        return "not a complete checkpoint"
    return f"{name} {'is missing' if how == 'missing' else 'has'}"
