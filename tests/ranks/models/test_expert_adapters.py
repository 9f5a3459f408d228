"""Updates of experts come from ``peft``, train as its own do on transformers' mixtures, and go back to it."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from lightning_megatron import AutoModule
from lightning_megatron.models.export_checkpoint import export_adapter
from tests.reference import pretrained
from tests.reference.peft_lora import MIXTURES, STEPS, truth
from tests.reference.plain_gpt import ADAM
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import Logged, loader, trainer

LAYOUTS = [Layout(), Layout(dp=2, ep=2), Layout(tp=2, sp=True), Layout(dp=4, ep=2, etp=2)]


def train(layout: Layout, folder: Path) -> dict[str, list[float]]:
    return {name: _train_one(name, layout, folder / name) for name in MIXTURES}


def _train_one(name: str, layout: Layout, folder: Path) -> list[float]:
    make = functools.partial(torch.optim.AdamW, **ADAM)
    module = AutoModule.from_pretrained(pretrained.new_model(name), optimizer=make).load_adapter(folder / "first")
    logged = Logged()
    run = trainer(layout, max_steps=STEPS, callbacks=[logged])
    run.fit(module, loader(pretrained.samples(name), layout, pretrained.ROWS, run))
    module.save_adapter(folder / f"last-{layout}")
    module.save_pretrained(folder / f"merged-{layout}")
    run.save_checkpoint(folder / f"checkpoint-{layout}")
    return [step["train_loss"] for step in logged.steps]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in MIXTURES:
        truth(name)["first"].save_pretrained(folder / name / "first")

    @functools.cache
    def of(layout):
        return folder, run_in_pool(layout.world_size, train, layout, folder, timeout=600)

    return of


def updates(model: Any) -> dict[str, torch.Tensor]:
    return peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_training_is_pefts(name, layout, results):
    folder, ranks = results(layout)
    for rank in ranks:
        assert rank[name] == pytest.approx(truth(name)["losses"], rel=1e-5)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(pretrained.new_model(name)), folder / name / f"last-{layout}")
    first, last, seen = updates(truth(name)["first"]), updates(truth(name)["last"]), updates(back)
    assert seen.keys() == last.keys()
    for key, value in last.items():
        torch.testing.assert_close(seen[key], value, rtol=0, atol=1e-4)
    assert all(float((value - first[key]).abs().max()) > 3e-3 for key, value in last.items() if ".experts." in key)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_merged_is_what_peft_merges(name, layout, results):
    merged = copy.deepcopy(truth(name)["last"]).merge_and_unload().eval()
    saved = type(merged).from_pretrained(results(layout)[0] / name / f"merged-{layout}").eval()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[key], value, rtol=0, atol=1e-4)
    for one, other in zip(pretrained.logits(saved, name), pretrained.logits(merged, name), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", MIXTURES)
def test_an_adapter_goes_out_of_a_checkpoint_and_in_again(name, results):
    layout = LAYOUTS[-1]
    folder = results(layout)[0] / name
    out = export_adapter(folder / f"checkpoint-{layout}", folder / "exported")
    one, other = (load_file(each / "adapter_model.safetensors") for each in (out, folder / f"last-{layout}"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in other)
    again = AutoModule.from_pretrained(pretrained.new_model(name)).load_adapter(out)
    again.build()
    again.save_adapter(folder / "again")
    back = load_file(folder / "again" / "adapter_model.safetensors")
    assert all(torch.equal(back[key], other[key]) for key in other)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["target_parameters"]
    assert not [name for name in settings["target_modules"] if "experts" in name]
