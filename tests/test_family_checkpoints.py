"""A BERT's or T5's checkpoint of one layout: resumed in another, and loaded without a strategy."""

from typing import Any

import pytest
import torch

from lightning_megatron import BertModule, T5Module
from tests import plain_bert, plain_t5
from tests.parallel import Layout, loader, trainer
from tests.parallel_bert import LoadedBert
from tests.parallel_t5 import LoadedT5
from tests.ranks import run_ranks

FAMILIES: dict[str, Any] = {
    "pretraining": (LoadedBert, BertModule, plain_bert),
    "classes": (LoadedBert, BertModule, plain_bert),
    "t5": (LoadedT5, T5Module, plain_t5),
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


@pytest.mark.parametrize("name", FAMILIES)
def test_another_layout_and_none(name, tmp_path):
    path = str(tmp_path / "three.ckpt")
    run_ranks(2, _train, name, Layout(tp=2, sp=True), path, False)
    other = Layout(dp=2) if name == "t5" else Layout(pp=2)
    assert max(run_ranks(2, _train, name, other, path, True)) < 1e-4
    (logits,) = run_ranks(1, _alone, name, path)
    torch.testing.assert_close(logits, _expected(name), rtol=0, atol=1e-4)
