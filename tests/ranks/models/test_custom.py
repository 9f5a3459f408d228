"""The examples of docs/custom.md: one override each, and what it changes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_megatron import BertConfig, BertModule, GPTModule, T5Config, T5Module
from lightning_megatron.callbacks import Throughput
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, Watch, text_samples
from tests.support.layout import Layout
from tests.support.pages import blocks
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import trainer

CONFIG = plain_gpt.replace(plain_gpt.GPT2, tie_embeddings=False)
LAYOUTS = [Layout(), Layout(tp=2, dp=2), Layout(tp=2, pp=2, sp=True), Layout(pp=2, vp=2)]


def example(name: str, *bases: type) -> Any:
    """A class of the page, on top of ``bases``."""
    names: dict[str, Any] = {"__name__": "custom"}
    for block in blocks("custom.md"):
        exec(compile(block, "custom.md", "exec"), names)
    return type(name, (*bases, names[name]), {}) if bases else names[name]


def _fit(layout: Layout, module: Any, rows: Any, **strategy: Any) -> Any:
    watch = Watch()
    run = trainer(layout, strategy, max_steps=3, callbacks=[watch])
    sampler = DistributedSampler(rows, layout.dp, run.strategy.data_parallel_rank, shuffle=False)
    run.fit(module, DataLoader(rows, batch_size=4 // layout.dp, sampler=sampler))
    return watch.losses, {name: float(value) for name, value in run.callback_metrics.items()}


def _answers(layout: Layout) -> Any:
    tokens = text_samples(CONFIG, 12)["tokens"]
    ours = Rows({"prompt": tokens[:, :6], "answer": tokens[:, 6:]})
    masked = tokens.clone()
    masked[:, :6] = -100
    theirs = Rows({"input_ids": tokens, "labels": masked})
    return _fit(layout, example("Answers", LoadedGPT)(CONFIG), ours)[0], _fit(layout, LoadedGPT(CONFIG), theirs)[0]


def _losses(layout: Layout, name: str) -> Any:
    return _fit(layout, example(name, LoadedGPT)(CONFIG), Rows(text_samples(CONFIG, 12)))


def _frozen(layout: Layout, config: Any) -> Any:
    module = example("FrozenEmbedding", LoadedGPT)(config)
    _fit(layout, module, Rows(text_samples(config, 12)))
    full = plain_gpt.initial_weights(config)
    return {n: torch.equal(p.detach(), module.shard_of(full, n, p)) for n, p in module.named_shards()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_batches_of_another_form(layout):
    for ours, theirs in run_in_pool(layout.world_size, _answers, layout):
        assert ours == theirs


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_another_loss(layout):
    samples = {name: value[:4] for name, value in text_samples(CONFIG, 12).items()}
    logits = plain_gpt.logits(CONFIG, plain_gpt.initial_weights(CONFIG), samples["tokens"])
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), samples["labels"], reduction="none")
    expected = (each * (1 - torch.exp(-each)) ** 2 * samples["loss_mask"]).sum() / samples["loss_mask"].sum()
    for losses, _ in run_in_pool(layout.world_size, _losses, layout, "Focal"):
        assert losses[0] == pytest.approx(float(expected), rel=1e-5)
        assert losses[2] < losses[0]


# Tied, the last stage has a copy of the embedding as its output layer, which is frozen along.
@pytest.mark.parametrize("config", [CONFIG, plain_gpt.GPT2], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_another_model(layout, config):
    for unchanged in run_in_pool(layout.world_size, _frozen, layout, config):
        assert {name for name, same in unchanged.items() if same} == {n for n in unchanged if "embedding" in n}


def _all_of_a_stage_frozen() -> None:
    module = GPTModule(CONFIG)
    build = module.build_model
    module.build_model = lambda first, last, virtual: build(first, last, virtual).requires_grad_(last)
    _fit(Layout(pp=2), module, Rows(text_samples(CONFIG, 12)))


def test_a_stage_without_anything_to_train_is_refused_on_all():
    with pytest.raises(RankError, match="pipeline stage 0 of 2 has no parameter to train") as error:
        run_ranks(2, _all_of_a_stage_frozen)
    assert str(error.value).count("pipeline stage 0 of 2") >= 2


class OddBert(BertModule):
    def get_batch(self, batch: Any) -> Any:
        return super().get_batch({"input_ids": batch["x"], "labels": batch["x"]})


class OddT5(T5Module):
    def get_batch(self, batch: Any) -> Any:
        return super().get_batch({"input_ids": batch["x"], "labels": batch["y"]})


def _odd(kind: type, config: Any) -> Any:
    rows = Rows({"x": torch.arange(4 * 13).view(4, 13), "y": torch.arange(4 * 7).view(4, 7)})
    run = trainer(Layout(tp=2, sp=True), max_steps=1)
    module = kind(config)
    run.fit(module, DataLoader(rows, batch_size=4))
    return [list(logits.shape) for logits in run.predict(module, DataLoader(rows, batch_size=4))]


@pytest.mark.parametrize("kind", [OddBert, OddT5])
def test_odd_lengths_of_another_form_under_sequence_parallelism(kind):
    sizes = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 6, "vocab_size": 60, "seq_length": 13}
    if kind is OddBert:
        config, shape = BertConfig(**sizes, task="masked_lm"), [4, 13, 60]
    else:
        config, shape = T5Config(**sizes, decoder_seq_length=7), [4, 7, 60]
    assert run_in_pool(2, _odd, kind, config) == [[shape], [shape]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_that_is_looked_at(layout):
    for losses, metrics in run_in_pool(layout.world_size, _losses, layout, "Perplexity"):
        # A mean of micro-batches' exponentials is a little more than the exponential of the mean.
        assert metrics["perplexity"] == pytest.approx(float(torch.tensor(losses[-1]).exp()), rel=0.05)


def _side_by_side(pairs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.cat([pair["input_ids"] for pair in pairs])}


def _contrastive(layout: Layout) -> Any:
    torch.manual_seed(1)
    config = BertConfig(
        num_layers=2, hidden_size=24, num_attention_heads=6, vocab_size=50, seq_length=12,
        task="sequence_classification", num_labels=10, make_vocab_size_divisible_by=10,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    ids = torch.randint(50, (24, 2, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 1, 2:] = ids[:, 0, 2:]  # the second differs in two words
    pairs, watch = Rows({"input_ids": ids}), Watch()
    run = trainer(layout, {"num_microbatches": 1}, max_steps=3, callbacks=[watch])
    sampler = DistributedSampler(pairs, layout.dp, run.strategy.data_parallel_rank, shuffle=False)
    data = DataLoader(
        pairs,
        8 // layout.dp,
        sampler=sampler,
        collate_fn=lambda rows: {"input_ids": torch.cat([r["input_ids"] for r in rows])},
    )
    run.fit(example("Contrastive")(config), data)
    return watch.losses, watch.norms


# One replica and two, which start from the same weights.
@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2), Layout(tp=2)], ids=str)
def test_a_new_task_over_the_replicas(layout):
    (losses, norms), *_ = run_in_pool(layout.world_size, _contrastive, layout)
    assert min(norms) > 0
    for seen in run_in_pool(2 * layout.world_size, _contrastive, replace(layout, dp=2)):
        assert seen[0] == pytest.approx(losses, rel=1e-5)
        assert seen[1] == pytest.approx(norms, rel=1e-4)


class Counted(GPTModule):
    rows: list[int] = []

    def get_batch(self, batch: Any) -> Any:
        self.rows.append(len(batch["x"]))
        return super().get_batch({"input_ids": batch["x"]})


def _rows_of_calls() -> list[int]:
    rows = Rows({"x": text_samples(CONFIG, 4)["tokens"]})
    throughput = Throughput()
    run = trainer(Layout(pp=2), {"micro_batch_size": 2}, max_steps=1, callbacks=[throughput])
    run.fit(Counted(CONFIG), DataLoader(rows, batch_size=4))
    assert throughput.consumed_tokens == rows.samples["x"].numel()
    return Counted.rows


def test_an_overridden_get_batch_is_called_with_micro_batches_only():
    for rows in run_in_pool(2, _rows_of_calls):
        assert rows == [2, 2, 2]  # the first call tells the length of what travels between the stages


def test_what_an_overridden_get_batch_returns_is_checked():
    module = Counted(CONFIG).build()
    with pytest.raises(ValueError, match="sequences of 17 tokens"):
        module.training_step({"x": torch.zeros(1, CONFIG.seq_length + 1, dtype=torch.long)}, 0)
    with pytest.raises(ValueError, match="token id 1000000 in 'input_ids' is outside"):
        module.training_step({"x": torch.tensor([[0, 1000000]])}, 0)
    module.check_batch("of any form")
