"""A BERT's or T5's checkpoint of one layout: resumed in another, loaded without a strategy, and exported."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_megatron import BertModule, T5Module
from lightning_megatron.checkpoint.consolidate import export
from tests.reference import plain_bert, plain_t5
from tests.reference.parallel_bert import LoadedBert
from tests.reference.parallel_t5 import LoadedT5
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool, run_ranks
from tests.support.trainer import loader, trainer

FAMILIES: dict[str, Any] = {
    "pretraining": (LoadedBert, BertModule, plain_bert),
    "classes": (LoadedBert, BertModule, plain_bert),
    "modern_mean": (LoadedBert, BertModule, plain_bert),
    **dict.fromkeys(plain_t5.CONFIGS, (LoadedT5, T5Module, plain_t5)),
}


def _train(name: str, layout: Layout, path: str, resume: bool) -> float:
    kind, _, truth = FAMILIES[name]
    module, run = kind(name), trainer(layout, max_steps=6 if resume else 3)
    samples = truth.samples(name, 12, 6)
    if resume:
        run.fit(module, loader(samples, layout, 12, run), ckpt_path=path)
        return module.distance(truth.train(name, 12, 6)["weights"])
    run.fit(module, loader(samples, layout, 12, run))
    run.save_checkpoint(path)
    return 0.0


def _alone(name: str, path: str) -> Any:
    _, kind, truth = FAMILIES[name]
    module = kind.load_from_checkpoint(path).eval()
    with torch.no_grad():
        output = module(**truth.batches(name, 12, 1)[0])
    return output[0] if isinstance(output, tuple) else output


def _expected(name: str) -> torch.Tensor:
    truth = FAMILIES[name][2]
    model, data = truth.new_model(name), truth.batches(name, 12, 3)
    optimizer = torch.optim.AdamW(model.parameters(), **truth.ADAM)
    for batch in data:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        output = model(**data[0])
    return output[1]  # behind the loss: logits, or those of the first head


PAIRS = [
    ("pretraining", Layout(tp=2, sp=True), Layout(pp=2)),
    ("classes", Layout(tp=2, sp=True), Layout(pp=2)),
    ("modern_mean", Layout(tp=2, sp=True), Layout(pp=2)),
    ("t5", Layout(tp=2, sp=True), Layout(pp=2)),
    ("t5", Layout(pp=4, split=2), Layout(tp=2, dp=2)),
    ("t5", Layout(pp=2, vp=2, split=3, dp=2), Layout(pp=4, split=2)),
    ("t5", Layout(tp=2, pp=2, sp=True), Layout(pp=2, vp=2, split=2)),
    ("learned", Layout(pp=4, split=3), Layout(tp=2, pp=2, sp=True)),
    ("t5_v1_1", Layout(pp=2, dp=2), Layout(pp=3, split=1, sharded=False)),
]


@pytest.mark.parametrize(("name", "written", "other"), PAIRS, ids=str)
def test_another_layout_and_none(name, written, other, tmp_path):
    path = str(tmp_path / "three.ckpt")
    run_in_pool(written.world_size, _train, name, written, path, False)
    assert max(run_in_pool(other.world_size, _train, name, other, path, True)) < 1e-4
    (logits,) = run_ranks(1, _alone, name, path)
    torch.testing.assert_close(logits, _expected(name), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(tp=2, pp=2, vp=2, split=3)], ids=str)
def test_export_of_a_t5s_pipeline(layout, tmp_path):
    path = str(tmp_path / "three.ckpt")
    run_in_pool(layout.world_size, _train, "t5", layout, path, False)
    exported = load_file(export(path, tmp_path / "t5.safetensors"))
    expected = plain_t5.train("t5", 12, 3)["weights"]
    assert exported.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(exported[name], weight, rtol=0, atol=1e-4)
