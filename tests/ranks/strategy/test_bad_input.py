"""Bad input is refused with a clear error, on every rank, and nothing is left hanging (``run_ranks`` has a limit)."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_megatron import GPTConfig, MegatronStrategy
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_ranks
from tests.support.trainer import trainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 3}, "devices"),
        ({"cp": 3}, "cp=2 or cp=4"),
        ({"cp": 2, "cp_comm": "p2p"}, "use 'ring'"),
        ({"cp_comm": "ring"}, "with cp=1"),
        ({"ep": 3}, "ep=2 or ep=4"),
        ({"micro_batch_size": 2, "num_microbatches": 2}, "give one"),
        ({"micro_batch_size": 0}, "whole number"),
        ({"recompute": "all"}, "'selective' or 'full'"),
        ({"pipeline_split_rank": 1}, "encoder-decoder"),
    ],
)
def test_the_strategy_refuses_before_a_process_starts(options, message):
    with pytest.raises(Exception, match=message):
        Trainer(accelerator="cpu", devices=4, strategy=MegatronStrategy(**options), logger=False)


@pytest.mark.parametrize(
    ("way", "change", "message"),
    [
        ("all_to_all", {"num_attention_heads": 3, "hidden_size": 24}, "3 heads do not divide by it"),
        ("ring", {"attention_dropout": 0.1}, "no kernel for attention_dropout=0.1"),
    ],
)
def test_a_way_across_ranks_that_the_model_cannot_take(way, change, message):
    strategy = MegatronStrategy(cp=2, cp_comm=way)
    run = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    module = LoadedGPT(replace(plain_gpt.GPT2, **change))
    module.trainer = run
    with pytest.raises(MisconfigurationException, match=message):
        strategy.connect(module)


def test_misspelt_names():
    with pytest.raises(TypeError, match="tensor_parallel"):
        MegatronStrategy(tensor_parallel=2)
    with pytest.raises(TypeError, match="num_layer"):
        GPTConfig(num_layer=2)
    sizes = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9, "seq_length": 4}
    with pytest.raises(ValueError, match="Did you mean 'attention_dropout'"):
        GPTConfig(**sizes, extra={"atention_dropout": 0.1})
    with pytest.raises(ValueError, match="Did you mean 'swiglu'"):
        GPTConfig(**sizes, activation="swiglo")


def test_precision_that_megatron_does_not_have():
    with pytest.raises(Exception, match="16-true"):
        Trainer(accelerator="cpu", devices=1, strategy=MegatronStrategy(), precision="16-true", logger=False)
    trainer = Trainer(accelerator="cpu", devices=1, strategy=MegatronStrategy(), precision="64-true", logger=False)
    with pytest.raises(Exception, match="does not train LoadedGPT with precision='64-true'"):
        trainer.fit(LoadedGPT(plain_gpt.GPT2))


def _fit(layout: Layout, change: str) -> None:
    samples = text_samples(plain_gpt.GPT2, 16)
    options: dict = {"max_steps": 3}
    strategy: dict = {}
    module = LoadedGPT(plain_gpt.GPT2)
    if change == "ids":
        samples["tokens"][3, 3] = 64
    elif change == "keys":
        samples = {"ids": samples["tokens"]}
    elif change == "length":
        samples = {"input_ids": torch.zeros(16, 20, dtype=torch.long)}
    elif change == "clip by value":
        options.update(gradient_clip_val=1.0, gradient_clip_algorithm="value")
    elif change == "micro-batch":
        strategy["micro_batch_size"] = 3
    elif change == "nan":
        module.configure_model_ = module.loss
        module.loss = lambda output, batch: (output.sum() * float("nan"), batch["loss_mask"].sum())
    elif change == "optimizer":
        module.configure_optimizers = lambda: torch.optim.Rprop(module.parameters())
    elif change == "left out":
        module.configure_optimizers = lambda: torch.optim.AdamW(list(module.parameters())[1:])
    elif change == "empty":
        samples = {name: value[:0] for name, value in samples.items()}
    elif change == "no engine":
        module.config = dataclasses.replace(module.config, layers="transformer_engine")
    trainer(layout, strategy, **options).fit(module, DataLoader(Rows(samples), batch_size=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ids", "token id 64 .*vocab_size=64"),
        ("keys", "'input_ids'.*\\['ids'\\]"),
        ("length", "sequences of 20 tokens.*seq_length=16"),
        ("clip by value", "clips by norm only"),
        ("micro-batch", "3"),
        ("nan", "loss of step 0 is nan .computed on rank 1.; there was no good step"),
        ("optimizer", "not Rprop"),
        ("left out", "are in no group"),
        ("empty", "no batch on this rank .its dataset has 0 samples"),
        ("no engine", "needs Transformer Engine.*layers='torch'"),
    ],
)
def test_every_rank_says_what_is_wrong(change, message):
    with pytest.raises(RankError, match=message) as error:
        run_ranks(2, _fit, Layout(pp=2), change, timeout=40)
    assert "gave no result" not in str(error.value)


class Broken(Rows):
    """A dataset that fails on one rank."""

    def __getitem__(self, i):
        import os

        if os.environ["RANK"] == "1" and i >= 8:
            raise OSError("the disk of rank 1 is gone")
        return super().__getitem__(i)


def _fit_broken(layout: Layout) -> None:
    data = DataLoader(Broken(text_samples(plain_gpt.GPT2, 64)), batch_size=8, sampler=range(64))
    trainer(layout, max_steps=6).fit(LoadedGPT(plain_gpt.GPT2), data)


@pytest.mark.parametrize("layout", [Layout(pp=2, dp=2), Layout(cp=2, pp=2)], ids=str)
def test_an_error_in_one_rank_ends_all_and_is_shown_as_the_first(layout):
    with pytest.raises(RankError, match="the disk of rank 1 is gone") as error:
        run_ranks(4, _fit_broken, layout, timeout=40)
    assert "gave no result" not in str(error.value)
    assert "This is a consequence. First, rank 1 raised OSError: the disk of rank 1 is gone" in str(error.value)
