"""``generate`` inside a Trainer: in predict and in hooks, and training that goes on as if nothing had been written."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from megatron.core.distributed import DistributedDataParallelConfig
from torch.utils.data import DataLoader

from lightning_megatron import GPTConfig, GPTModule, T5Module, on_all_stages
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support import writers
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import Logged, loader, trainer
from tests.support.writers import asked, assert_as_transformers

REQUESTS = ("greedy-end", "beams-long", "drawn-top")


class GPTPredictor(GPTModule):
    @on_all_stages
    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.generate(**batch, max_new_tokens=writers.NEW, pad_token_id=0, **self.options)


class T5Predictor(T5Module):
    predict_step = GPTPredictor.predict_step

    def check_batch(self, batch: Any) -> None:
        """Prompts have no labels."""


class Unmarked(GPTModule):
    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.generate(**batch, max_new_tokens=2)


def predict(name: str, layout: Layout) -> dict[str, Any]:
    module = (T5Predictor if name == "t5" else GPTPredictor).from_pretrained(writers.model(name))
    run, found = trainer(layout), {}
    for request in REQUESTS:
        module.options = asked(name, request)
        (found[request],) = run.predict(module, DataLoader(Rows(writers.prompts(name)), batch_size=3))
    return found


def predict_unmarked(layout: Layout) -> None:
    module = Unmarked.from_pretrained(writers.model("gpt2"))
    trainer(layout).predict(module, DataLoader(Rows(writers.prompts("gpt2")), batch_size=3))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gpt2-deep", Layout(pp=2, vp=2)),
        ("llama-deep", Layout(pp=2, vp=2)),
        ("llama", Layout(tp=2, pp=2, sp=True)),
        ("gpt2", Layout(tp=2, sp=True)),
        ("t5", Layout(tp=2, sp=True)),
        ("t5", Layout(pp=2, vp=2)),
        ("llama", Layout(cp=2)),
        ("gpt2", Layout(tp=2, cp=2, sp=True)),
        ("t5", Layout(cp=2)),
    ],
    ids=str,
)
def test_predict_writes_as_transformers(name: str, layout: Layout) -> None:
    for texts in run_in_pool(layout.world_size, predict, name, layout):
        for request, found in texts.items():
            assert_as_transformers(name, request, found)


def test_a_step_in_a_pipeline_says_what_to_do() -> None:
    with pytest.raises(RankError, match="Mark the hook with lightning_megatron.on_all_stages"):
        run_ranks(2, predict_unmarked, Layout(pp=2))


class Writes(Callback):
    """Writes at each validation's end, differently each time, in train mode of the module's parts."""

    def __init__(self, prompts: dict[str, torch.Tensor]) -> None:
        self.prompts = prompts
        self.texts: list[Any] = []

    def on_validation_epoch_end(self, run: Trainer, module: Any) -> None:
        self.texts.append(module.generate(**self.prompts, max_new_tokens=5, do_sample=True).tolist())
        self.texts.append(module.generate(**self.prompts, max_new_tokens=5, num_beams=2).tolist())

    def on_train_batch_end(self, run: Trainer, module: Any, *_: Any) -> None:
        before = [part.training for part in module.modules()]
        # Of 8 tokens: half of a row of training, for which a context-parallel rank has other rotary angles.
        self.texts.append(module.generate(**self.prompts, max_new_tokens=1, do_sample=True).tolist())
        assert [part.training for part in module.modules()] == before
        assert not any(part.is_inference() for part in module.parameters())


DROPPING = GPTConfig(
    num_layers=4,
    hidden_size=48,
    num_attention_heads=6,
    num_query_groups=2,
    ffn_hidden_size=40,
    vocab_size=211,
    seq_length=16,
    position_embedding="rope",
    normalization="RMSNorm",
    activation="swiglu",
    hidden_dropout=0.1,
    attention_dropout=0.1,
    init_method_std=0.3,
    make_vocab_size_divisible_by=8,
)


def train_twice(layout: Layout, overlaps: bool) -> dict[str, Any]:
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=overlaps, overlap_param_gather=overlaps)
    found: dict[str, Any] = {}
    for kind in ("silent", "writing"):
        torch.manual_seed(1)
        logged, writes = Logged(), Writes(writers.prompts("llama"))
        module = GPTModule(DROPPING)
        run = trainer(
            layout,
            {"ddp": ddp},
            max_steps=4,
            val_check_interval=2,
            limit_val_batches=1,
            callbacks=[logged] + [writes] * (kind == "writing"),
        )
        data = Rows(text_samples(DROPPING, 16))
        run.fit(module, loader(data, layout, 4, run), loader(data, layout, 4, run))
        found[kind] = [(step["train_loss"], step["grad_norm"]) for step in logged.steps]
        found["drawn"] = torch.rand(3).tolist() if kind == "silent" else found["drawn"] == torch.rand(3).tolist()
        found["texts"] = writes.texts
    found["after"] = module.generate(**writers.prompts("llama"), max_new_tokens=5).tolist()
    return found


@pytest.mark.parametrize(
    ("layout", "overlaps"),
    [
        (Layout(), False),
        (Layout(tp=2, sp=True), False),
        (Layout(pp=2, vp=2), False),
        (Layout(dp=2), True),
        (Layout(cp=2), True),
    ],
    ids=str,
)
def test_training_goes_on_as_if_nothing_had_been_written(layout: Layout, overlaps: bool) -> None:
    results = run_in_pool(layout.world_size, train_twice, layout, overlaps)
    for result in results:
        assert result["writing"] == result["silent"]
        assert len(result["silent"]) == 4
        assert len(set(result["silent"])) == 4
        assert result["drawn"] is True
        assert len(result["texts"]) == 4 + 2 * 3  # steps, and validations with the sanity check
    for key in ("after", "texts"):
        texts = [result[key] for result in results]
        assert layout.dp > 1 or texts.count(texts[0]) == len(texts)
    assert results[0]["after"] == results[-1]["after"]  # replicas, too, have the same model
