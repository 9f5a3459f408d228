"""Between the steps that log, a step reads nothing from the device, whatever the number of micro-batches."""

from functools import partial

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from lightning_megatron import BertConfig, BertModule, GPTConfig, GPTModule, T5Config, T5Module
from tests.support.device_reads import DeviceReads
from tests.support.layout import Layout
from tests.support.trainer import trainer

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 64, "seq_length": 16, "num_layers": 1}
ROWS = 16
fused = partial(torch.optim.AdamW, lr=1e-3, fused=True)  # others ask for their step count, which is on the host


def padded(rows):
    """Rows of tokens, of which the first is padded; some tokens have no label."""
    ids = torch.arange(len(rows) * 16).view(-1, 16) % 50 + 5
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ids % 3 == 0, -100)}


def packed(rows):
    """Two documents to a row."""
    batch = padded(rows)
    return {**batch, "attention_mask": None, "position_ids": torch.arange(8).repeat(len(rows), 2)}


def pairs(rows):
    return {**padded(rows), "next_sentence_label": torch.tensor([0, 1]).repeat(len(rows) // 2)}


CASES = {
    "gpt": (lambda: GPTModule(GPTConfig(**SIZES), optimizer=fused), padded),
    "gpt, packed": (lambda: GPTModule(GPTConfig(position_embedding="rope", **SIZES), optimizer=fused), packed),
    "bert": (lambda: BertModule(BertConfig(task="pretraining", **SIZES), optimizer=fused), pairs),
    "t5": (lambda: T5Module(T5Config(**SIZES), optimizer=fused), padded),
}


def reads(case, micro_batches, on_nonfinite, **options):
    make, collate = CASES[case]
    watch = DeviceReads(batch=2)
    strategy = {"num_microbatches": micro_batches, "on_nonfinite": on_nonfinite}
    options = {"log_every_n_steps": 10, "gradient_clip_val": 0.5, **options}
    run = trainer(Layout(), strategy, callbacks=[watch], max_epochs=1, logger=DummyLogger(), **options)
    run.fit(make(), DataLoader(range(3 * ROWS), batch_size=ROWS, collate_fn=collate))
    return watch.found


@pytest.mark.parametrize("case", CASES)
def test_a_step_between_logs_reads_nothing(case):
    assert [reads(case, number, "ignore") for number in (2, 16)] == [{}, {}]


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_losses_and_norm_are_looked_at_in_one_read(on_nonfinite):
    assert [reads("gpt", number, on_nonfinite) for number in (2, 16)] == [{"_local_scalar_dense": 1}] * 2


def test_accumulated_batches_are_looked_at_together():
    assert reads("gpt", 2, "raise", accumulate_grad_batches=3) == {"_local_scalar_dense": 1}
    assert reads("gpt", 2, "raise", accumulate_grad_batches=4) == {"_local_scalar_dense": 1}  # the epoch's end


def test_without_clipping_nothing_is_read_either():
    assert reads("gpt", 2, "ignore", gradient_clip_val=None) == {}
