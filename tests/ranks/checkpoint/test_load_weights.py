"""A new run that starts from the weights of a checkpoint, and from nothing else of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_megatron import BertConfig, BertModule, GPTModule
from lightning_megatron.checkpoint.consolidate import tensors
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import trainer

CONFIG = plain_gpt.ODD_UNTIED  # a vocabulary that is padded, to other sizes by other layouts


class Started(LoadedGPT):
    """Keeps what it starts from, in place of the truth's weights."""

    def configure_model(self) -> None:
        GPTModule.configure_model(self)

    def on_train_start(self) -> None:
        full = self.full
        shards = [(parameter.detach(), self.shard_of(full, name, parameter)) for name, parameter in self.named_shards()]
        self.distance = max(float((mine - theirs).abs().max()) for mine, theirs in shards)


def _save(layout: Layout, path: str, precision: str) -> None:
    run = trainer(layout, {}, precision, max_steps=2)
    run.fit(LoadedGPT(CONFIG), DataLoader(Rows(text_samples(CONFIG, 16)), batch_size=8))
    run.save_checkpoint(path)


def _start(layout: Layout, path: str) -> Any:
    module = Started(CONFIG).load_weights(path)
    module.full = dict(tensors(Path(path), prefer_main=True))
    run = trainer(layout, max_steps=1)
    run.fit(module, DataLoader(Rows(text_samples(CONFIG, 8)), batch_size=8))
    return module.distance, run.global_step


@pytest.mark.parametrize(
    ("before", "precision", "now"),
    [
        (Layout(tp=2, pp=2), "32-true", Layout(tp=3, sp=True)),
        (Layout(pp=2, vp=2), "bf16-mixed", Layout(tp=2, dp=2)),  # the fp32 main weights
    ],
    ids=str,
)
def test_any_layout_starts_from_any(before, precision, now, tmp_path):
    path = str(tmp_path / "saved.ckpt")
    run_in_pool(before.world_size, _save, before, path, precision)
    for distance, steps in run_in_pool(now.world_size, _start, now, path):
        assert distance == 0.0
        assert steps == 1


def _bert(task: str, layout: Layout, path: str, strict: bool | None) -> Any:
    sizes = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 6, "vocab_size": 60, "seq_length": 8}
    sizes["make_vocab_size_divisible_by"] = 10
    module = BertModule(BertConfig(**sizes, task=task, num_labels=3))
    if strict is not None:
        module.load_weights(path, strict)
    rows = {"input_ids": torch.arange(32).view(4, 8)}
    rows["labels"] = rows["input_ids"] if task == "masked_lm" else torch.tensor([0, 1, 2, 0])
    run = trainer(layout, max_steps=1)
    first: dict[str, torch.Tensor] = {}
    module.on_train_start = lambda: first.update({n: p.detach().clone() for n, p in module.named_shards()})
    run.fit(module, DataLoader(Rows(rows), batch_size=4))
    if strict is None:
        run.save_checkpoint(path)
    return first, {n: p.detach().clone() for n, p in module.named_shards()}


def test_another_head_starts_anew(tmp_path):
    path = str(tmp_path / "mlm.ckpt")
    (_, trained), _ = run_in_pool(2, _bert, "masked_lm", Layout(tp=2), path, None)
    (first, _), _ = run_in_pool(2, _bert, "sequence_classification", Layout(tp=2), path, False)
    same = {name for name in first if name in trained and torch.equal(first[name], trained[name])}
    assert {name for name in first if name.startswith(("embedding", "encoder"))} <= same
    assert any(name not in trained for name in first)
    with pytest.raises(RankError, match=r"(?s)of another architecture.*load_weights\(strict=False\)"):
        run_ranks(2, _bert, "sequence_classification", Layout(tp=2), path, True)


def test_mistakes_are_named_at_once(tmp_path):
    with pytest.raises(Exception, match="not a complete checkpoint"):
        GPTModule(CONFIG).load_weights(tmp_path)


def _pretrained(path: str) -> list[float]:
    """How far weights are from the pretrained and the checkpoint's: of a layer that both have, and of one it lacks."""
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64, n_positions=16)
    source = GPT2LMHeadModel(config)
    saved = GPTModule.from_pretrained(GPT2LMHeadModel(GPT2Config(**{**config.to_diff_dict(), "n_layer": 1})))
    run = trainer(Layout(), max_steps=1)
    run.fit(saved, DataLoader(Rows(text_samples(plain_gpt.GPT2, 4)), batch_size=4))
    run.save_checkpoint(path)
    module = GPTModule.from_pretrained(source).load_weights(path, strict=False).build()
    new = {name: weight.detach() for name, weight in module.named_shards()}
    old = dict(tensors(Path(path), prefer_main=True))
    plain = {name: weight.detach() for name, weight in GPTModule.from_pretrained(source).build().named_shards()}
    first, second = (f"decoder.layers.{number}.mlp.linear_fc1.weight" for number in (0, 1))
    assert second not in old
    return [float((new[first] - old[first]).abs().max()), float((new[second] - plain[second]).abs().max())]


def test_what_the_checkpoint_lacks_stays_pretrained(tmp_path):
    assert run_in_pool(1, _pretrained, str(tmp_path / "one_layer.ckpt")) == [[0.0, 0.0]]
