"""Rows long enough for attention in pieces, against transformers in one process, under layouts and recomputation.

Tolerances as in ``test_position_ids``.
"""

import functools

import pytest
import torch
import transformers as hf
from torch.utils.data import DataLoader

from lightning_megatron import AutoModule
from tests.reference.plain_gpt import ADAM
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import Logged, trainer

Batch = dict[str, torch.Tensor]
STEPS, ROWS, LENGTH, VOCAB = 2, 4, 150, 61
WINDOW = 20


def packed(generator: torch.Generator) -> Batch:
    ids = torch.randint(1, VOCAB, (ROWS, LENGTH), generator=generator)
    cuts = [(5, 100), (0, 90), (20, 149), (70, 80)]
    parts = [(first, last - first, LENGTH - last) for first, last in cuts]
    positions = torch.stack([torch.cat([torch.arange(size) for size in sizes]) for sizes in parts])
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def padded(generator: torch.Generator) -> Batch:
    ids, places = torch.randint(1, VOCAB, (ROWS, LENGTH), generator=generator), torch.arange(LENGTH)
    first, last = torch.tensor([0, 31, 7, 0])[:, None], torch.tensor([150, 150, 90, 110])[:, None]
    keep = (places >= first) & (places < last)
    return {"input_ids": ids, "labels": ids.masked_fill(~keep, -100), "attention_mask": keep.long()}


FORMS = {"packed": packed, "padded": padded}
CASES = [(form, window) for form in FORMS for window in (None, WINDOW)]


def batches(form: str) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [FORMS[form](generator) for _ in range(STEPS)]


def new_model(window: int | None) -> hf.PreTrainedModel:
    torch.manual_seed(3)
    config = hf.MistralConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH + 2,
        initializer_range=0.1,
        sliding_window=window,
    )
    model = hf.MistralForCausalLM(config).eval()
    model.config.architectures = [type(model).__name__]
    return model


@functools.cache
def truth(form: str, window: int | None) -> list[float]:
    model = new_model(window)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses = []
    for batch in batches(form):
        loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(layout: Layout, recompute: str | None) -> list[list[float]]:
    found = []
    for form, window in CASES:
        module = AutoModule.from_pretrained(new_model(window), optimizer=functools.partial(torch.optim.AdamW, **ADAM))
        logged = Logged()
        run = trainer(layout, max_steps=STEPS, callbacks=[logged], strategy={"recompute": recompute})
        run.fit(module, DataLoader(batches(form), batch_size=None))
        found.append([step["train_loss"] for step in logged.steps])
    return found


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        (Layout(), None),
        (Layout(), "selective"),
        (Layout(tp=2, pp=2, sp=True), "full"),
        (Layout(tp=2, pp=2, sp=True), None),
    ],
    ids=str,
)
def test_losses_are_transformers(layout, recompute):
    for rank in run_in_pool(layout.world_size, train, layout, recompute, timeout=240):
        for case, losses in zip(CASES, rank, strict=True):
            assert losses == pytest.approx(truth(*case), rel=1e-5), case
