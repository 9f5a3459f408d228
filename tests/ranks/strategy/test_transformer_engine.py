"""Layers and fp8 recipes of Transformer Engine, as far as a stand-in for it shows them without a GPU."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.support.pages import ROOT

# Prints the losses of three steps, and the recipes that Transformer Engine was given, as a line of JSON for each run.
RUNS = """
import json

import torch
import transformer_engine
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins import TransformerEnginePrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Format
from transformer_engine.common.recipe import MXFP8BlockScaling, NVFP4BlockScaling

from lightning_megatron import GPTConfig, GPTModule, MegatronStrategy
from lightning_megatron.data import TextDataModule

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Watched(GPTModule):
    def log_loss(self, stage, loss, weight):
        self.losses = [*getattr(self, "losses", []), float(loss)]
        super().log_loss(stage, loss, weight)


def train(layers, **precision):
    seed_everything(1, verbose=False)
    del transformer_engine.seen[:]
    try:
        trainer = Trainer(
            accelerator="cpu", devices=1, strategy=MegatronStrategy(), max_steps=3, limit_val_batches=0, **QUIET,
            **precision,
        )
        module = Watched(GPTConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, vocab_size=257, seq_length=16,
            layers=layers,
        ))
        trainer.fit(module, TextDataModule(seq_length=16, batch_size=4))
    except MisconfigurationException as error:
        print(json.dumps(str(error)))
        return
    recipes = sorted({repr(recipe).removeprefix("TE") for recipe in transformer_engine.seen})
    print(json.dumps([module.losses, recipes]))


def plugin(recipe, dtype=torch.bfloat16, **more):
    return TransformerEnginePrecision(weights_dtype=dtype, recipe=recipe, **more)


if __name__ == "__main__":
    for layers in ("torch", "transformer_engine"):
        train(layers)
    train("torch", precision="bf16-mixed")
    train("transformer_engine", precision="transformer-engine")
    own = DelayedScaling(
        margin=1, fp8_format=Format.E4M3, amax_history_len=16, amax_compute_algo="most_recent",
        override_linear_precision=(False, False, True),
    )
    for recipe in (own, Float8CurrentScaling(fp8_dpa=True), MXFP8BlockScaling(), Float8BlockScaling()):
        train("transformer_engine", plugins=plugin(recipe))
    train("transformer_engine", plugins=plugin(None, torch.float16))
    train("torch", precision="transformer-engine")
    train("transformer_engine", plugins=plugin(NVFP4BlockScaling()))
    train("transformer_engine", plugins=plugin(DelayedScaling(reduce_amax=False)))
    train("transformer_engine", plugins=plugin(None, replace_layers=True))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each run printed, with the stand-in installed as ``transformer_engine`` 2.9."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "transformer_engine").mkdir()
    shutil.copy(ROOT / "tests/support/transformer_engine_stub.py", folder / "transformer_engine" / "__init__.py")
    metadata = folder / "transformer_engine-2.9.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformer_engine\nVersion: 2.9.0\n")
    (folder / "runs.py").write_text(RUNS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "runs.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[[", '"'))]


def test_the_layers_train_as_those_of_torch(told):
    (plain, none), (ours, no_recipe) = told[:2]
    assert ours == pytest.approx(plain, rel=1e-6)
    assert len(ours) == 3
    assert none == no_recipe == []


@pytest.mark.parametrize(
    ("run", "recipe"),
    [
        (3, "DelayedScaling(margin=0, fp8_format=<Format.HYBRID: 'hybrid'>, amax_history_len=1024,"
            " amax_compute_algo='max'"),
        (4, "DelayedScaling(margin=1, fp8_format=<Format.E4M3: 'e4m3'>, amax_history_len=16,"
            " amax_compute_algo='most_recent'"),
        (5, "Float8CurrentScaling(fp8_format=<Format.HYBRID: 'hybrid'>, fp8_dpa=True"),
        (6, "MXFP8BlockScaling(margin=0, fp8_format=<Format.E4M3: 'e4m3'>"),
        (7, "Float8BlockScaling(fp8_format=<Format.E4M3: 'e4m3'>"),
        (8, "DelayedScaling(margin=0"),
    ],
)  # fmt: skip
def test_a_recipe_reaches_transformer_engine(told, run, recipe):
    """And all else is as without fp8, which the stand-in leaves out: bf16 or fp16 weights."""
    losses, recipes = told[run]
    assert len(recipes) == 1
    assert recipes[0].startswith(recipe)
    if run == 4:
        assert "override_linear_precision=(False, False, True)" in recipes[0]
    steps = 1 if run == 8 else 3  # fp16 repeats its first steps until the loss scale is small enough
    assert losses[:steps] == pytest.approx(told[2][0][:steps], rel=1e-3)


def test_what_fp8_cannot_have_is_refused(told):
    refused = ["precision='bf16-mixed'", "no fp8 recipe like NVFP4", "reduce_amax=False", "replace_layers=True"]
    assert len(told) == 9 + len(refused)
    for words, error in zip(refused, told[9:], strict=True):
        assert words in error
