"""Models of the user's own, from ``examples/``, train under every layout as their twins of torch's layers do."""

import functools
from textwrap import indent
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from tests.reference import parallel_vit, plain_vit
from tests.reference.from_truth import FromTruth
from tests.reference.plain_gpt import ADAM, Weights
from tests.support.layout import Layout
from tests.support.pages import ROOT, blocks
from tests.support.ranks import run_in_pool
from tests.support.trainer import Logged, loader, trainer

VIT_LAYOUTS = [
    Layout(),
    Layout(dp=2),
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(tp=2, pp=2, sp=True),
    Layout(pp=2, vp=2),
    Layout(tp=2, pp=2, vp=2),
]


@pytest.mark.parametrize("layout", VIT_LAYOUTS, ids=str)
def test_vit(layout, tmp_path):
    expected, path = plain_vit.train(), str(tmp_path / "vit.ckpt")
    assert max(expected["norms"]) > plain_vit.CLIP
    images, labels = plain_vit.samples()
    for seen in run_in_pool(layout.world_size, parallel_vit.train, layout, path):
        assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert seen["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert seen["distance"] < 1e-5
        right = (expected["logits"].argmax(1) == labels).float().mean()
        assert seen["validated"] == pytest.approx(
            {"val_loss": float(F.cross_entropy(expected["logits"], labels)), "val_accuracy": float(right)}, rel=1e-4
        )
        torch.testing.assert_close(seen["predicted"], expected["logits"], rtol=0, atol=1e-4)
    other = Layout(pp=2) if layout.tp > 1 else Layout(tp=2)
    for predicted, distance in run_in_pool(2, parallel_vit.resumed, other, path):
        assert distance < 1e-5
        torch.testing.assert_close(predicted, expected["logits"], rtol=0, atol=1e-4)


def test_the_page_shows_what_the_examples_do():
    """``own_model.md``: its code is cut from the scripts, and its commands are those of ``examples.md``."""
    scripts = [(ROOT / f"examples/train_{name}.py").read_text() for name in ("mlp", "vit")]
    for piece in "\n\n\n".join(blocks("own_model.md")).split("\n\n\n"):  # a class, or a method without its indentation
        code = piece.strip()
        assert any(code in script or indent(code, "    ") in script for script in scripts), code
    known = "".join(blocks("examples.md", "bash")).splitlines()
    for command in "".join(blocks("own_model.md", "bash")).splitlines():
        assert any(line.startswith(command) for line in known), command


mlp_example = parallel_vit.example("train_mlp")
ROWS, STEPS = 12, 5


@functools.cache
def first_mlp() -> Weights:
    shapes = {
        "up.weight": (256, 2), "up.bias": (256,), "down.weight": (32, 256), "down.bias": (32,),
        "head.weight": (3, 32), "head.bias": (3,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def plain_mlp(weights: Weights, points: torch.Tensor) -> torch.Tensor:
    for name in ("up", "down"):
        points = F.linear(points, weights[f"{name}.weight"], weights[f"{name}.bias"]).relu()
    return F.linear(points, weights["head.weight"], weights["head.bias"])


@functools.cache
def mlp_truth() -> dict[str, Any]:
    weights = {name: weight.clone().requires_grad_() for name, weight in first_mlp().items()}
    optimizer = torch.optim.AdamW(weights.values(), **ADAM)
    losses, norms = [], []
    for batch in DataLoader(mlp_example.spirals(ROWS * STEPS, 1), batch_size=ROWS):
        optimizer.zero_grad()
        loss = F.cross_entropy(plain_mlp(weights, batch["points"]), batch["labels"])
        loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm([weight.grad for weight in weights.values()])))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "weights": {name: w.detach() for name, w in weights.items()}}


class LoadedMLP(FromTruth, mlp_example.MLPModule):  # type: ignore[misc]
    config = SimpleNamespace(is_gated=False)

    def initial_weights(self) -> Weights:
        return first_mlp()


def train_mlp(layout: Layout) -> dict[str, Any]:
    module, watch = LoadedMLP(), Logged()
    run = trainer(layout, max_steps=STEPS, callbacks=[watch])
    run.fit(module, loader(mlp_example.spirals(ROWS * STEPS, 1), layout, ROWS, run))
    return {
        "losses": [step["train_loss"] for step in watch.steps],
        "norms": [step["grad_norm"] for step in watch.steps],
        "distance": module.distance(mlp_truth()["weights"]),
    }


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, dp=2)], ids=str)
def test_mlp(layout):
    expected = mlp_truth()
    for seen in run_in_pool(layout.world_size, train_mlp, layout):
        assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert seen["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert seen["distance"] < 1e-5
