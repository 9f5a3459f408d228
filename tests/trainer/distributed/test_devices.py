"""A device context that stands says nothing about this project's tensors: each is made where it belongs.

Lightning builds models under one of the GPU's, and `torch.set_default_device` puts one up for good. Here "meta" stands
in for the GPU: what lands there unasked has no values, and the next use of it fails.
"""

import ast
import copy
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import lightning_megatron
from lightning_megatron import AutoModule, GPTConfig, GPTModule, LoRA
from lightning_megatron.callbacks import Perplexity, TrainingMonitor
from lightning_megatron.data import HFDataModule, MaskedLMCollator, SentencePairCollator, SpanCorruptionCollator
from lightning_megatron.data.collators.padding import PaddingCollator
from tests.reference import pretrained
from tests.reference.plain_gpt import ADAM
from tests.support import indexed
from tests.support.layout import Layout
from tests.support.trainer import trainer

FACTORIES = {function.__name__ for function in _device_constructors()}
# They name no device themselves, and what they make they move.
OTHERS = ("/lightning/", "/torchmetrics/", "/torch/utils/data/", "/torch/optim/")


class StandingContext(TorchFunctionMode):
    """A context of "meta" around a whole run, but for Lightning's own tensors and the draws of torch's loaders."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _device_constructors() and kwargs.get("device") is None and not _is_others(sys._getframe(1)):
            kwargs["device"] = torch.device("meta")
        return function(*args, **kwargs)


def _is_others(frame: Any) -> bool:
    """Whether the innermost caller outside of torch's tensors is one of ``OTHERS``."""
    while "/torch/" in (file := frame.f_code.co_filename) and not any(part in file for part in OTHERS):
        frame = frame.f_back
    return any(part in file for part in OTHERS)


class Batches:
    """A loader without torch's."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(copy.deepcopy(self.batches))

    def __len__(self) -> int:
        return len(self.batches)


def devices(batch: dict[str, torch.Tensor]) -> set[str]:
    return {tensor.device.type for tensor in batch.values()}


def test_every_tensor_of_the_package_is_made_on_a_device_that_is_named() -> None:
    package = Path(lightning_megatron.__file__).parent
    silent = [
        f"{path.relative_to(package)}:{node.lineno}: {ast.unparse(node)}"
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in FACTORIES
        and not any(keyword.arg in ("device", None) for keyword in node.keywords)
    ]
    assert not silent


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-sequences", "t5"])
def test_models_are_built_where_they_are_told(name: str, tmp_path: Path) -> None:
    """From files, with an adapter made, saved, loaded and merged, and asked for text; against transformers' own."""
    pretrained.new_model(name).save_pretrained(tmp_path / "model")
    batch = pretrained._batch(name, 0)
    truth = pretrained.truth(name)["logits"][-1]
    with torch.device("meta"):
        module = AutoModule.from_pretrained(tmp_path / "model", lora=LoRA(rank=2, targets="all-linear"))
        module.build(device="cpu")
        module.save_adapter(tmp_path / "adapter")
        again = AutoModule.from_pretrained(tmp_path / "model").load_adapter(tmp_path / "adapter").build(device="cpu")
        with torch.no_grad():
            logits = again(**batch)
        again.save_pretrained(tmp_path / "merged")
        text = None if "bert" in name else again.generate([[1, 2, 3]], max_new_tokens=3, num_beams=2)
    assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"cpu"}
    torch.testing.assert_close(logits, truth, atol=1e-4, rtol=1e-4)  # B starts at zero; tolerances of test_pretrained
    for first, second in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)
    assert text is None or text.device.type == "cpu"


@pytest.mark.parametrize("name", ["llama", "gpt2-lora", "bert-masked", "t5"])
def test_a_run_is_the_same_whatever_stands(name: str, tmp_path: Path) -> None:
    """Trained, clipped, validated, saved, resumed and exported."""
    model = name.removesuffix("-lora")
    pretrained.new_model(model)
    batches = Batches([pretrained._batch(model, step) for step in range(2)])
    losses = []
    for context in (torch.device("cpu"), StandingContext()):
        torch.manual_seed(1)
        with context:
            losses.append(_losses(name, batches, tmp_path / type(context).__name__))
    assert losses[0] == losses[1]


def _losses(name: str, batches: Batches, folder: Path) -> list[float]:
    found = []
    for steps in (2, 4):
        module: Any = AutoModule.from_pretrained(
            pretrained.new_model(name.removesuffix("-lora")),
            optimizer=functools.partial(torch.optim.AdamW, **ADAM),
            lora=LoRA(rank=2, dropout=0.1) if name.endswith("-lora") else None,
        )
        callbacks = [TrainingMonitor(), *([Perplexity()] if name == "llama" else [])]
        run = trainer(Layout(), max_steps=steps, gradient_clip_val=0.5, callbacks=callbacks)
        run.fit(module, batches, batches, ckpt_path=folder / "checkpoint" if steps > 2 else None)
        run.save_checkpoint(folder / "checkpoint")
        found += [float(run.callback_metrics[f"{stage}_loss"]) for stage in ("train", "val")]
    if not name.startswith("bert"):
        module.save_pretrained(folder / "model")
    return found


def test_data_is_on_the_host(tmp_path: Path) -> None:
    """What collators, indexed data and streams give, and a generator of the host's beside it."""
    masking = MaskedLMCollator(120, 3, special_ids=[1, 2])
    rows = [{"input_ids": list(range(5, 5 + length)), "next_sentence_label": 1} for length in (9, 12, 7)]
    pairs = [{"sentences": [[5, 6, 7], [8, 9], [10, 11, 12]]}] * 4
    for kind, documents in (("gpt", 60), ("bert", 60), ("t5", 60)):
        sentences = 1 if kind == "gpt" else 4
        indexed.write(
            tmp_path / ("gpt" if kind == "gpt" else "sentences"), documents, 64 if kind == "gpt" else 200, sentences
        )
    with torch.device("meta"):
        assert devices(masking(rows)) == {"cpu"}
        assert devices(SpanCorruptionCollator(range(100, 115), 30)(rows)) == {"cpu"}
        assert devices(SentencePairCollator(masking, 1, 2, seq_length=32)(pairs)) == {"cpu"}
        assert devices(PaddingCollator(0)(rows)) == {"cpu"}
        for kind in ("gpt", "bert", "t5"):
            data = indexed.make(kind, tmp_path, train_samples=8)
            data.prepare_data()
            data.setup("fit")
            assert devices(data._dataset("train")[0]) == {"cpu"}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_of_the_hubs_is_read_under_a_context(streaming: bool) -> None:
    texts = datasets.Dataset.from_dict({"text": ["a text of some words"] * 40})
    config = GPTConfig(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=257, seq_length=16)
    with StandingContext():
        data = HFDataModule(texts, seq_length=16, batch_size=4, streaming=streaming, split=("train", None, None))
        run = trainer(Layout(), max_steps=2)
        run.fit(GPTModule(config), data)
    assert run.global_step == 2
