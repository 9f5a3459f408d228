"""Trains the vision transformer of ``examples/train_vit.py`` from ``plain_vit``'s weights, and says what to compare."""

import importlib.util
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils.data import TensorDataset

from tests.reference import plain_vit
from tests.reference.from_truth import FromTruth
from tests.reference.plain_gpt import Weights
from tests.support.layout import Layout
from tests.support.pages import ROOT
from tests.support.trainer import Logged, loader, trainer


def example(name: str) -> ModuleType:
    """A script of ``examples/``, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class LoadedViT(FromTruth, example("train_vit").ViTModule):  # type: ignore[misc]
    """Starts from the truth's weights."""

    config = SimpleNamespace(is_gated=False)

    def initial_weights(self) -> Weights:
        return plain_vit.megatron_weights(plain_vit.new_model())


def train(layout: Layout, path: str, **options: Any) -> dict[str, Any]:
    """Train, save, and predict all images on this rank."""
    module, watch = LoadedViT(**plain_vit.SIZES), Logged()
    run = trainer(layout, options, max_steps=plain_vit.STEPS, gradient_clip_val=plain_vit.CLIP, callbacks=[watch])
    data = TensorDataset(*plain_vit.samples())
    run.fit(module, loader(data, layout, plain_vit.ROWS, run))
    run.save_checkpoint(path)
    distance = module.distance(plain_vit.train()["weights"])
    (validated,) = run.validate(module, loader(data, layout, plain_vit.ROWS, run), verbose=False)
    predicted = torch.cat(run.predict(module, loader(data, layout, plain_vit.ROWS, run)))
    return {
        "losses": [step["train_loss"] for step in watch.steps],
        "norms": [step["grad_norm"] for step in watch.steps],
        "distance": distance,
        "validated": validated,
        "predicted": predicted,
    }


def resumed(layout: Layout, path: str) -> tuple[torch.Tensor, float]:
    """What a checkpoint's weights predict in another layout, and their distance to the truth's."""
    module = LoadedViT(**plain_vit.SIZES)
    run, data = trainer(layout), TensorDataset(*plain_vit.samples())
    rows = loader(data, layout, plain_vit.ROWS, run)
    return torch.cat(run.predict(module, rows, ckpt_path=path)), module.distance(plain_vit.train()["weights"])
