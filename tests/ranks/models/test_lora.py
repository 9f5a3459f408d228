"""Low-rank updates train as ``peft``'s do on transformers' model in one process, under every layout.

``peft`` makes the first updates, which are loaded here; tolerances as in ``test_pretrained``.
"""

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from lightning_megatron import AutoModule, GPTModule, LoRA
from lightning_megatron.checkpoint import CheckpointError
from tests.reference import pretrained
from tests.reference.peft_lora import STEPS, TARGETS, truth
from tests.reference.plain_gpt import ADAM
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import Logged, loader, trainer

EXPORTED = ("llama", "gpt2", "bert-sequences", "bert-tokens", "llama-sequences")
LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(cp=2), Layout(tp=2, pp=2, sp=True)]


def run_on_rank(names: list[str], layout: Layout, folder: Path) -> dict[str, Any]:
    return {name: _run_one(name, layout, folder / name) for name in names}


def _run_one(name: str, layout: Layout, folder: Path) -> dict[str, Any]:
    make = functools.partial(torch.optim.AdamW, **ADAM)
    module = AutoModule.from_pretrained(pretrained.new_model(name), optimizer=make)
    module.load_adapter(folder / "first")
    logged = Logged()
    run = trainer(layout, max_steps=STEPS, callbacks=[logged])
    run.fit(module, loader(pretrained.samples(name), layout, pretrained.ROWS, run))
    module.save_adapter(folder / f"last-{layout}")
    module.save_pretrained(folder / f"merged-{layout}")
    if name in EXPORTED:
        run.save_checkpoint(folder / f"checkpoint-{layout}")
    frozen = [p for p in module.parameters() if not p.requires_grad]
    held = sum(len(states) for states in [run.optimizers[0].state]) if hasattr(run.optimizers[0], "state") else 0
    return {
        "losses": [step["train_loss"] for step in logged.steps],
        "buffers of frozen": sum(getattr(p, "main_grad", None) is not None for p in frozen),
        "states": held,
        "trained": sum(p.requires_grad for p in module.parameters()),
        "frozen": len(frozen),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    for name in TARGETS:
        truth(name)["first"].save_pretrained(folder / name / "first")

    @functools.cache
    def of(layout):
        return folder, run_in_pool(layout.world_size, run_on_rank, list(TARGETS), layout, folder, timeout=240)

    return of


def updates(model: Any) -> dict[str, torch.Tensor]:
    return peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_training_is_pefts(name, layout, results):
    folder, ranks = results(layout)
    for rank in ranks:
        assert rank[name]["losses"] == pytest.approx(truth(name)["losses"], rel=1e-5)
    base = copy.deepcopy(pretrained.new_model(name))
    back = peft.PeftModel.from_pretrained(base, folder / name / f"last-{layout}")
    first, last, seen = updates(truth(name)["first"]), updates(truth(name)["last"]), updates(back)
    assert seen.keys() == last.keys()
    for key, value in last.items():
        torch.testing.assert_close(seen[key], value, rtol=0, atol=1e-4)
    assert max(float((value - first[key]).abs().max()) for key, value in last.items()) > 3e-3


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_merged_is_what_peft_merges(name, layout, results):
    merged = copy.deepcopy(truth(name)["last"]).merge_and_unload().eval()
    saved = type(merged).from_pretrained(results(layout)[0] / name / f"merged-{layout}").eval()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[key], value, rtol=0, atol=1e-4)
    for one, other in zip(pretrained.logits(saved, name), pretrained.logits(merged, name), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_frozen_costs_nothing(layout, results):
    for rank in results(layout)[1]:
        for name, seen in rank.items():
            assert seen["buffers of frozen"] == 0, name
            assert seen["trained"] > 0
            assert seen["frozen"] > 0


def test_a_checkpoint_of_any_layout_goes_on_and_out(results):
    from lightning_megatron.models.export_checkpoint import export_pretrained

    layout = LAYOUTS[-1]
    folder = results(layout)[0] / "llama"
    module = GPTModule.load_from_checkpoint(folder / f"checkpoint-{layout}").eval()
    assert module.lora.rank == 3
    merged = copy.deepcopy(truth("llama")["last"]).merge_and_unload().eval()
    ids = pretrained.samples("llama")[0]["input_ids"][None]
    with torch.no_grad():
        torch.testing.assert_close(module(input_ids=ids), merged(ids).logits, rtol=0, atol=2e-4)
    export_pretrained(folder / f"checkpoint-{layout}", folder / "exported")
    one, other = (load_file(folder / name / "model.safetensors") for name in ("exported", f"merged-{layout}"))
    assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.parametrize("name", EXPORTED)
def test_an_adapter_of_a_checkpoint_is_the_modules(name, results):
    from lightning_megatron.models.export_checkpoint import export_adapter

    layout = LAYOUTS[-1]
    folder = results(layout)[0] / name
    out = export_adapter(folder / f"checkpoint-{layout}", folder / "exported adapter")
    one, other = (load_file(each / "adapter_model.safetensors") for each in (out, folder / f"last-{layout}"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in other)
    settings = [(each / "adapter_config.json").read_text() for each in (out, folder / f"last-{layout}")]
    assert settings[0] == settings[1]
    if name == "llama":
        model = peft.PeftModel.from_pretrained(copy.deepcopy(pretrained.new_model(name)), out).eval()
        module = GPTModule.load_from_checkpoint(folder / f"checkpoint-{layout}").eval()
        ids = pretrained.samples(name)[0]["input_ids"][None]
        with torch.no_grad():
            torch.testing.assert_close(module(input_ids=ids), model(ids).logits, rtol=0, atol=1e-5)


def test_a_checkpoint_without_updates_has_no_adapter(tmp_path):
    from lightning_megatron.models.export_checkpoint import export_adapter

    module = AutoModule.from_pretrained(pretrained.new_model("llama"))
    run = trainer(Layout())
    run.predict(module, [])
    run.save_checkpoint(tmp_path / "plain", weights_only=True)
    with pytest.raises(CheckpointError, match="has no low-rank updates.*Leave --adapter out"):
        export_adapter(tmp_path / "plain", tmp_path / "out")


def _start(name: str, layout: Layout, folder: Path) -> None:
    lora = LoRA(rank=4, alpha=8, targets="all-linear")
    module = AutoModule.from_pretrained(pretrained.new_model(name), lora=lora)
    trainer(layout).predict(module, [])
    module.save_adapter(folder / f"start-{layout}")


def test_updates_start_alike_in_every_layout_and_change_nothing_yet(tmp_path):
    for layout in (Layout(), Layout(tp=2), Layout(pp=2)):
        run_in_pool(layout.world_size, _start, "llama", layout, tmp_path)
    one, *others = (load_file(tmp_path / f"start-{x}" / "adapter_model.safetensors") for x in ("one", "tp2", "pp2"))
    assert len(one) == 2 * 2 * 7
    for other in others:
        assert all(torch.equal(one[key], other[key]) for key in one)
    downs = [value for key, value in one.items() if "lora_A" in key]
    assert len({float(value[0, 0]) for value in downs}) == len(downs)
    assert all(0.5 < value.abs().max() * value.size(1) ** 0.5 <= 1 for value in downs)  # kaiming_uniform(√5)
    assert not any(value.any() for key, value in one.items() if "lora_B" in key)


def _recompute(layout: Layout, recompute: object) -> list[float]:
    lora = LoRA(rank=4, alpha=8, targets=["q_proj", "down_proj"])
    make = functools.partial(torch.optim.AdamW, **ADAM)
    module = AutoModule.from_pretrained(pretrained.new_model("llama"), lora=lora, optimizer=make)
    logged = Logged()
    run = trainer(layout, {"recompute": recompute}, max_steps=4, callbacks=[logged])
    run.fit(module, loader(pretrained.samples("llama"), layout, pretrained.ROWS, run))
    return [step["train_loss"] for step in logged.steps]


def test_recomputed_layers_have_updates_too():
    kinds = (None, "full", 1, "selective", ["mlp"])
    plain, *recomputed = [run_in_pool(1, _recompute, Layout(), kind)[0] for kind in kinds]
    assert all(losses == plain for losses in recomputed)
    assert plain[0] != plain[-1]


def test_ranks_hear_of_an_adapter_of_other_sizes(tmp_path):
    truth("qwen3")["first"].save_pretrained(tmp_path)
    with pytest.raises(RankError, match="The adapter's update of .* has shapes"):
        run_ranks(2, _wrong_sizes, tmp_path)


def _wrong_sizes(folder: Path) -> None:
    module = AutoModule.from_pretrained(pretrained.new_model("llama")).load_adapter(folder)
    trainer(Layout(tp=2)).predict(module, [])
