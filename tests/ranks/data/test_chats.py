"""Conversations that share a row are learnt as each alone is, in any layout; the rows are those of TRL's trainer."""

from pathlib import Path

import datasets
import pytest

from lightning_megatron import GPTConfig, GPTModule
from lightning_megatron.data import ChatDataModule
from tests.support.chats import CHATML, CHATS, MARKED, tokenizer
from tests.support.hf_data import made
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import trainer

SIZE = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 192}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows():
    return datasets.Dataset.from_list([{"messages": messages} for messages in CHATS])


def validate_and_fit(layout, packing, folder, steps=0):
    """The loss over all conversations, and after some steps."""
    datasets.config.HF_DATASETS_CACHE = Path(folder)
    own = tokenizer(CHATML)
    data = ChatDataModule(
        {"train": rows(), "validation": rows()}, split=("train", "validation", None), tokenizer=own, packing=packing,
        seq_length=192, batch_size=6 // layout.dp, shuffle=False, drop_last=True,
    )  # fmt: skip
    module = GPTModule(GPTConfig(**SIZE, vocab_size=data.vocab_size, position_embedding="learned"))
    run = trainer(layout, max_steps=steps, limit_val_batches=99)
    losses = [run.validate(module, data, verbose=False)[0]["val_loss"]]
    if steps:
        run.fit(module, data)
        losses.append(float(run.callback_metrics["val_loss"]))
    return losses


def test_conversations_in_a_row_are_learnt_as_each_alone_in_any_layout(tmp_path):
    ((alone,),) = run_in_pool(1, validate_and_fit, Layout(), False, str(tmp_path))
    (single,) = run_in_pool(1, validate_and_fit, Layout(), True, str(tmp_path), 3)
    assert single[0] == pytest.approx(alone, rel=1e-6)
    assert single[1] < single[0]
    for layout in (Layout(tp=2, sp=True), Layout(pp=2), Layout(dp=2)):
        for losses in run_in_pool(2, validate_and_fit, layout, True, str(tmp_path), 3):
            assert losses == pytest.approx(single, rel=1e-5), layout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["turns", "completion"])
def test_rows_are_those_of_trls_trainer(kind, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    own, options = tokenizer(MARKED), {}
    table = rows()
    if kind == "completion":
        parts = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in CHATS]
        table = datasets.Dataset.from_list(parts)
        options = {"prompt_column": "prompt", "messages_column": "completion", "loss_on": "all"}
    arguments = SFTConfig(
        str(tmp_path), max_length=192, assistant_only_loss=kind == "turns", use_cpu=True, report_to="none", bf16=False
    )
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(own), n_positions=192, n_embd=16, n_layer=1, n_head=2))
    theirs = SFTTrainer(model, arguments, train_dataset=table, processing_class=own).train_dataset
    options = {"packing": False, "seq_length": 192, "batch_size": 99, "shuffle": False, **options}
    (batch,) = made(kind=ChatDataModule, dataset=table, tokenizer=own, **options).train_dataloader()
    shown = batch["attention_mask"].bool()
    ours = [
        {name: batch[name][number][keep].tolist() for name in ("input_ids", "labels")}
        for number, keep in enumerate(shown)
    ]
    assert len(theirs) == len(ours) > 15
    key = str
    expected = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in theirs]
    assert sorted(ours, key=key) == sorted(expected, key=key)
    assert any(-100 in row["labels"] for row in ours)
