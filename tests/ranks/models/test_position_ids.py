"""``position_ids`` and masks of a batch count as in transformers' models trained in one process, under every layout.

Tolerances as in ``test_pretrained``: both sides add up the same numbers in another order.
"""

import copy
import functools

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from lightning_megatron import AutoModule, GPTConfig, GPTModule
from tests.reference import pretrained
from tests.reference.plain_gpt import ADAM
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import Logged, trainer

Batch = dict[str, torch.Tensor]
MODELS = ["llama", "gpt2", "gpt_neox", "mistral"]  # rotary, learned, rotary in part, with a window
STEPS, ROWS, LENGTH = 2, 4, 21


def draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(1, pretrained.VOCAB, shape, generator=generator)


def flattened(generator: torch.Generator) -> Batch:
    texts = [{"input_ids": draw(generator, length).tolist()} for length in (9, 30, 1, 27)]  # longer than the model's 64
    return transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(texts)


def packed(generator: torch.Generator) -> Batch:
    ids = draw(generator, ROWS, LENGTH)
    positions = torch.stack([torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)]) for cut in (5, 0, 20, 11)])
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def jumping(generator: torch.Generator) -> Batch:
    """Positions that begin anew in one document, since there is a mask."""
    return {**packed(generator), "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long)}


def padded_in_front(generator: torch.Generator) -> Batch:
    ids, keep = draw(generator, ROWS, LENGTH), torch.arange(LENGTH) >= torch.tensor([0, 3, 7, 1])[:, None]
    positions = (keep.long().cumsum(1) - 1).masked_fill(~keep, 1)
    return {"input_ids": ids, "labels": ids.masked_fill(~keep, -100), "attention_mask": keep, "position_ids": positions}


def looking_ahead(generator: torch.Generator) -> Batch:
    """A mask of queries and keys: a prefix sees itself whole."""
    ids, mask = draw(generator, ROWS, LENGTH), torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[:6, :6] = True
    return {"input_ids": ids, "labels": ids, "attention_mask": mask.expand(ROWS, 1, LENGTH, LENGTH).clone()}


def added(generator: torch.Generator) -> Batch:
    """The same, as numbers on the scores."""
    batch = looking_ahead(generator)
    return {
        **batch,
        "attention_mask": torch.zeros(ROWS, 1, LENGTH, LENGTH).masked_fill(~batch["attention_mask"], -3e38),
    }


def shifted(generator: torch.Generator) -> Batch:
    batch = packed(generator)
    return {**batch, "shift_labels": batch["labels"].roll(1, 1)}


FORMS = {f.__name__: f for f in (flattened, packed, jumping, padded_in_front, looking_ahead, added, shifted)}
CASES = [
    (name, form) for name in MODELS for form in FORMS
    if not (name == "mistral" and form in ("looking_ahead", "added"))  # refused, below
]  # fmt: skip


def batches(form: str) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [FORMS[form](generator) for _ in range(STEPS)]


@functools.cache
def truth(name: str, form: str) -> list[float]:
    model = copy.deepcopy(pretrained.new_model(name))
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses = []
    for batch in batches(form):
        loss = model(**batch, use_cache=False).loss  # with its cache transformers does not look for documents
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(cases: list[tuple[str, str]], layout: Layout) -> list[list[float]]:
    found = []
    for name, form in cases:
        module = AutoModule.from_pretrained(
            pretrained.new_model(name), optimizer=functools.partial(torch.optim.AdamW, **ADAM)
        )
        logged = Logged()
        run = trainer(layout, max_steps=STEPS, callbacks=[logged])
        run.fit(module, DataLoader(batches(form), batch_size=None))
        found.append([step["train_loss"] for step in logged.steps])
    return found


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, sp=True)], ids=str)
def test_losses_are_transformers(layout):
    for rank in run_in_pool(layout.world_size, train, CASES, layout, timeout=240):
        for case, losses in zip(CASES, rank, strict=True):
            assert losses == pytest.approx(truth(*case), rel=1e-5), case


def test_documents_apart_are_the_documents_alone():
    """What is compared with: transformers itself keeps them apart."""
    model, (batch, _) = pretrained.new_model("llama"), batches("flattened")
    total, count = 0.0, 0
    for text in batch["input_ids"][0].split([9, 30, 1, 27]):
        if len(text) > 1:
            total += model(text[None], labels=text[None]).loss.item() * (len(text) - 1)
            count += len(text) - 1
    assert truth("llama", "flattened")[0] == pytest.approx(total / count, rel=1e-5)


CONFIG = GPTConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=16, seq_length=8)
TE = {"layers": "transformer_engine"}
IDS = torch.ones(2, 4, dtype=torch.long)
SQUARE = torch.ones(2, 1, 4, 4)


@pytest.mark.parametrize(
    ("options", "batch", "says"),
    [
        ({}, {"position_ids": torch.zeros(2, 3).long()}, r"'position_ids' are \(2, 3\).*and the tokens \(2, 4\)"),
        ({}, {"position_ids": torch.zeros(2, 4)}, "float32.*a whole number"),
        ({}, {"position_ids": IDS * 8}, "8 in 'position_ids' is outside of 0 to 7.*seq_length=8"),
        ({}, {"position_ids": -IDS}, "-1 in 'position_ids'"),
        ({}, {"attention_mask": torch.ones(2, 5)}, r"'attention_mask' is \(2, 5\).*it is \(2, 1, 4, 4\) or \(2, 4\)"),
        ({}, {"attention_mask": SQUARE}, "float32 must be True where a query looks, or 0.0"),
        ({}, {"attention_mask": SQUARE.long()}, "int64 must be True where a query looks"),
        ({"sliding_window": 3}, {"attention_mask": SQUARE.bool()}, "takes the place of the window"),
        (TE, {"position_ids": IDS}, "'position_ids' that begin documents.*layers='torch'"),
        (TE, {"attention_mask": torch.tensor([[0, 1, 1, 1]] * 2)}, "this 'attention_mask'"),
    ],
    ids=str,
)
def test_what_is_no_position_or_mask_is_refused(options, batch, says):
    module = GPTModule(GPTConfig(**{**vars(CONFIG), **options}))
    with pytest.raises(ValueError, match=says):
        module.check_batch({"input_ids": IDS, **batch})


def test_what_is_harmless_is_taken():
    module = GPTModule(GPTConfig(**{**vars(CONFIG), **TE, "position_embedding": "rope"}))
    module.check_batch({"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 0, 0]] * 2)})
    module.check_batch({"input_ids": IDS, "position_ids": torch.arange(-1, 3).expand(2, 4)})
    with pytest.raises(ValueError, match="reset_attention_mask=True.*layers='transformer_engine'"):
        GPTModule(GPTConfig(**{**vars(CONFIG), **TE}), eod_id=0, reset_attention_mask=True)
