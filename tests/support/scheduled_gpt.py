"""A small GPT whose learning rate follows a schedule."""

import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_megatron import GPTConfig, GPTModule
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples

CONFIG = GPTConfig(
    num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=64, seq_length=16, make_vocab_size_divisible_by=16
)


BATCH, BATCHES, EPOCHS = 8, 5, 4  # two batches to a step, and a short window at the end of each epoch


def adam(parameters):
    return torch.optim.AdamW(parameters, **plain_gpt.ADAM)


class Scheduled(LoadedGPT):
    configure_optimizers = GPTModule.configure_optimizers


def loaders(dp: int, rank: int) -> tuple[DataLoader, DataLoader]:
    train, val = Rows(text_samples(CONFIG, BATCH * BATCHES)), Rows(text_samples(CONFIG, 2 * BATCH))
    return tuple(
        DataLoader(rows, batch_size=BATCH // dp, sampler=DistributedSampler(rows, dp, rank, shuffle=False))
        for rows in (train, val)
    )
