"""Rows that several documents share, against the documents one by one in plain PyTorch."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lightning_megatron import GPTModule
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, Watch
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import trainer

EOD, ROWS, STEPS = 0, 4, 4
APART = {"eod_id": EOD, "reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
CONFIGS = {"GPT2": plain_gpt.GPT2, "LLAMA": plain_gpt.LLAMA}


def packed(config: Any) -> torch.Tensor:
    """Rows ``[ROWS * STEPS, s + 1]`` of documents of 1 to 9 tokens and their ends; the last may go on past the row."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, config.vocab_size, (ROWS * STEPS, config.seq_length + 1), generator=generator)
    for row in ids:
        place = 0
        while (place := place + int(torch.randint(1, 10, (), generator=generator)) + 1) < len(row):
            row[place - 1] = EOD
    return ids


def documents(row: torch.Tensor) -> list[torch.Tensor]:
    ends = [0, *(row[:-1] == EOD).nonzero().flatten().add(1).tolist()]
    return [row[start:stop] for start, stop in zip(ends, [*ends[1:], len(row)], strict=True)]


@functools.cache
def truth(name: str) -> dict[str, Any]:
    config = CONFIGS[name]
    weights = {n: value.clone().requires_grad_() for n, value in plain_gpt.initial_weights(config).items()}
    optimizer = torch.optim.AdamW(weights.values(), **plain_gpt.ADAM)
    losses = []
    for rows in packed(config).split(ROWS):
        total, count = torch.zeros(()), 0
        for document in (d for row in rows for d in documents(row)):
            if len(document) < 2:
                continue
            logits = plain_gpt.logits(config, weights, document[None, :-1])[0]
            total = total + F.cross_entropy(logits, document[1:], reduction="sum")
            count += len(document) - 1
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "weights": {n: value.detach() for n, value in weights.items()}}


def _samples(config: Any, form: str) -> dict[str, torch.Tensor]:
    text = packed(config)
    if form == "text":
        return {"text": text}
    if form == "tokens":
        return {"tokens": text[:, :-1], "labels": text[:, 1:]}
    if form == "positions":
        tokens = text[:, :-1]
        ends = tokens == EOD
        positions = torch.stack([torch.cat([torch.arange(len(d)) for d in documents(row)])[:-1] for row in text])
        return {"tokens": tokens, "labels": text[:, 1:].masked_fill(ends, -100), "position_ids": positions}
    return {"input_ids": text}  # transformers' form is shifted by the module; one place longer


def _train(name: str, layout: Layout, form: str, options: dict[str, Any], full: Any) -> Any:
    config, watch = CONFIGS[name], Watch()
    rows = Rows(_samples(config, form))
    module = LoadedGPT(plain_gpt.replace(config, seq_length=config.seq_length + 2 * (form == "input_ids")), **options)
    run = trainer(layout, max_epochs=1, callbacks=[watch])
    sampler = DistributedSampler(rows, layout.dp, run.strategy.data_parallel_rank, shuffle=False)
    run.fit(module, DataLoader(rows, batch_size=ROWS // layout.dp, sampler=sampler))
    distance = max(float((p.detach() - module.shard_of(full, n, p)).abs().max()) for n, p in module.named_shards())
    return watch.losses, distance


LAYOUTS = [Layout(), Layout(tp=2, pp=2, sp=True), Layout(pp=2, vp=2), Layout(tp=2, dp=2)]

FORMS = [("GPT2", "text"), ("LLAMA", "tokens"), ("LLAMA", "input_ids"), ("LLAMA", "positions"), ("GPT2", "positions")]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_documents_in_a_row_train_as_they_do_alone(name, form, layout):
    expected = truth(name)
    options = {} if form == "positions" else APART
    for losses, distance in run_in_pool(layout.world_size, _train, name, layout, form, options, expected["weights"]):
        assert losses == pytest.approx(expected["losses"], rel=1e-5)
        assert distance < 1e-4


def test_an_option_without_the_documents_end_is_refused():
    with pytest.raises(ValueError, match="reset_attention_mask=True. needs eod_id"):
        GPTModule(plain_gpt.GPT2, reset_attention_mask=True)
