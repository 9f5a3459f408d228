"""Low-rank updates train as ``peft``'s do on transformers' model in one process, under every layout.

``peft`` makes the first updates, which are loaded here; tolerances as in ``test_pretrained``.
"""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from lightning_megatron import AutoModule, GPTModule, LoRA
from tests.reference import pretrained
from tests.reference.plain_gpt import ADAM
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import Logged, loader, trainer

# Targets of each model: some of the parts of a layer, all, and a layer that is stored as one.
TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "qwen3": ["k_proj", "gate_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "t5": ["q", "v", "wi", "o"],
    "t5-1.1": ["k", "wi_0", "wo"],
    "bert-masked": ["query", "value", "attention.output.dense"],
    "bert-sequences": ["query", "value"],
    "bert-tokens": ["key"],
}
# What is trained whole beside the updates, where that is said; of classifiers peft does so unasked.
WHOLE = {"gpt2": ["wpe", "ln_f"], "bert-sequences": ["pooler"]}
TASKS = {"bert-sequences": "SEQ_CLS", "bert-tokens": "TOKEN_CLS"}
LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2, sp=True)]


def config(name: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS[name], lora_dropout=0.0,
        modules_to_save=WHOLE.get(name), task_type=TASKS.get(name), **options,
    )  # fmt: skip


@functools.cache
def truth(name: str) -> dict[str, Any]:
    """peft's first updates, its losses and its last updates."""
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(pretrained.new_model(name)), config(name, fan_in_fan_out=name == "gpt2"))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:  # zeros would hide what becomes of A
            torch.nn.init.normal_(parameter.data, std=0.05)
        elif "modules_to_save" in key:  # what the model itself has would hide what the adapter brings
            parameter.data += torch.randn_like(parameter) * 0.05
    first = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAM)
    losses = []
    for step in range(pretrained.STEPS):
        loss = model(**pretrained._batch(name, step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"first": first, "losses": losses, "last": model}


def run_on_rank(names: list[str], layout: Layout, folder: Path) -> dict[str, Any]:
    return {name: _run_one(name, layout, folder / name) for name in names}


def _run_one(name: str, layout: Layout, folder: Path) -> dict[str, Any]:
    make = functools.partial(torch.optim.AdamW, **ADAM)
    module = AutoModule.from_pretrained(pretrained.new_model(name), optimizer=make)
    module.load_adapter(folder / "first")
    logged = Logged()
    run = trainer(layout, max_steps=pretrained.STEPS, callbacks=[logged])
    run.fit(module, loader(pretrained.samples(name), layout, pretrained.ROWS, run))
    module.save_adapter(folder / f"last-{layout}")
    module.save_pretrained(folder / f"merged-{layout}")
    if name == "llama":
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


def test_dropout_leaves_inputs_of_updates_out():
    lora = LoRA(rank=4, alpha=8, targets=["q_proj"], dropout=0.5)
    module = AutoModule.from_pretrained(pretrained.new_model("llama"), lora=lora).build()
    for chunk in module.chunks:
        for key, parameter in chunk.named_parameters():
            if key.endswith(".B"):
                torch.nn.init.normal_(parameter.data)
    ids = pretrained.samples("llama")[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(module(input_ids=ids), module(input_ids=ids))
        module.train()
        assert not torch.equal(module(input_ids=ids), module(input_ids=ids))


def test_a_new_head_is_trained_with_the_updates():
    model = pretrained.new_model("bert-masked")
    lora = LoRA(targets=["query"])
    with pytest.warns(UserWarning, match="new head"):
        module = AutoModule.from_pretrained(model, config={"task": "sequence_classification"}, lora=lora).build()
    trained = {name.partition(".")[2] for name, p in module.chunks.named_parameters() if p.requires_grad}
    heads = {name for name in trained if "_lora" not in name}
    assert heads == {
        f"{part}.{kind}" for part in ("pooler.dense", "classification_head") for kind in ("weight", "bias")
    }
    also = LoRA(targets=["query"], also_train=["embedding.position_embeddings"])
    module = AutoModule.from_pretrained(model, lora=also).build()
    trained = [name for name, p in module.chunks.named_parameters() if p.requires_grad and "_lora" not in name]
    assert trained == ["0.embedding.position_embeddings.weight"]


def test_what_an_adapter_does_not_hold_is_named(tmp_path):
    also = LoRA(targets=["query"], also_train=["embedding.word_embeddings", "embedding.position_embeddings"])
    module = AutoModule.from_pretrained(pretrained.new_model("bert-masked"), lora=also)
    with pytest.warns(UserWarning, match=r"lacks these.*\n  embedding.word_embeddings.weight$"):
        module.save_adapter(tmp_path / "adapter")
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["modules_to_save"] == ["bert.embeddings.position_embeddings"]
    both = LoRA(targets=["query"], also_train=["encoder.layers.0.self_attention.linear_qkv"])
    module = AutoModule.from_pretrained(pretrained.new_model("bert-masked"), lora=both)
    with pytest.warns(UserWarning, match=r"lacks these.*\n  encoder.layers.0.self_attention.linear_qkv.bias"):
        module.save_adapter(tmp_path / "both")
    peft.PeftModel.from_pretrained(copy.deepcopy(pretrained.new_model("bert-masked")), tmp_path / "both")
    misspelt = LoRA(targets=["query"], also_train=["embedding.position_embedding"])
    with pytest.raises(ValueError, match=r"no such part. Did you mean 'embedding.position_embeddings'\?"):
        AutoModule.from_pretrained(pretrained.new_model("bert-masked"), lora=misspelt).build()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "rank=0.*whole number from 1"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"dropout": 1.0}, "dropout=1.0.*probability"),
        ({"targets": []}, "name layers, or use 'all-linear'"),
    ],
    ids=str,
)
def test_numbers_that_make_no_update(options, says):
    with pytest.raises(ValueError, match=says):
        LoRA(**options)


def test_a_target_that_is_no_layer_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"no layer is called 'q_prj'. Did you mean 'q_proj'\? There are .*v_proj"):
        AutoModule.from_pretrained(pretrained.new_model("llama"), lora=LoRA(targets=["v_proj", "q_prj"]))
    AutoModule.from_pretrained(pretrained.new_model("llama"), lora=LoRA(targets=r".*layers\.0\..*_proj"))
    AutoModule.from_pretrained(pretrained.new_model("llama"), lora=LoRA(targets=["linear_qkv"]))


def test_adapters_that_do_not_fit(tmp_path):
    module = AutoModule.from_pretrained(pretrained.new_model("llama"))
    with pytest.raises(FileNotFoundError, match="is no adapter: it needs adapter_config.json"):
        module.load_adapter(tmp_path)
    truth("gpt2")["first"].save_pretrained(tmp_path / "gpt2")
    truth("gpt_neox")["first"].save_pretrained(tmp_path / "gpt_neox")
    with pytest.raises(ValueError, match="no layer is called"):
        AutoModule.from_pretrained(pretrained.new_model("llama")).load_adapter(tmp_path / "gpt_neox")
    about = json.loads((tmp_path / "gpt2" / "adapter_config.json").read_text())
    (tmp_path / "gpt2" / "adapter_config.json").write_text(json.dumps({**about, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora=True, for which there is no counterpart"):
        AutoModule.from_pretrained(pretrained.new_model("gpt2")).load_adapter(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="has no LoRA"):
        AutoModule.from_pretrained(pretrained.new_model("gpt2")).save_adapter(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "whole", "says"),
    [
        ("gpt2", ["wte"], "holds transformer.wte.weight whole, which peft trains apart from what it is tied to"),
        ("llama", ["layers.0.self_attn.k_proj"], r"lacks weights that .* in one tensor.*\n  model.layers.0.*q_proj"),
    ],
)
def test_parts_trained_whole_that_have_no_place(name, whole, says, tmp_path):
    about = peft.LoraConfig(r=2, target_modules=TARGETS[name][1:3], modules_to_save=whole)
    peft.get_peft_model(copy.deepcopy(pretrained.new_model(name)), about).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says):
        AutoModule.from_pretrained(pretrained.new_model(name)).load_adapter(tmp_path)


def test_a_classifier_of_another_model_has_no_place(tmp_path):
    truth("bert-tokens")["first"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"have no place in the model:\n  classifier.bias\n  classifier.weight"):
        AutoModule.from_pretrained(pretrained.new_model("bert-masked")).load_adapter(tmp_path)


def test_a_new_head_goes_to_peft_and_comes_back(tmp_path):
    with pytest.warns(UserWarning, match="new head"):
        module = AutoModule.from_pretrained(
            pretrained.new_model("bert-masked"), config={"task": "token_classification"}, lora=LoRA(targets=["query"])
        ).build()
    module.state_dict()["chunks.0.classification_head.weight"].normal_()
    module.save_adapter(tmp_path)
    weight = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(weight, module.state_dict()["chunks.0.classification_head.weight"])
    with pytest.warns(UserWarning, match="new head"):
        other = AutoModule.from_pretrained(pretrained.new_model("bert-masked"), config={"task": "token_classification"})
    other = other.load_adapter(tmp_path).build()
    assert torch.equal(weight, other.state_dict()["chunks.0.classification_head.weight"])


def _recompute(layout: Layout, recompute: str) -> list[float]:
    lora = LoRA(rank=4, alpha=8, targets=["q_proj", "down_proj"])
    make = functools.partial(torch.optim.AdamW, **ADAM)
    module = AutoModule.from_pretrained(pretrained.new_model("llama"), lora=lora, optimizer=make)
    logged = Logged()
    run = trainer(layout, {"recompute": recompute}, max_steps=4, callbacks=[logged])
    run.fit(module, loader(pretrained.samples("llama"), layout, pretrained.ROWS, run))
    return [step["train_loss"] for step in logged.steps]


def test_recomputed_layers_have_updates_too():
    losses = [run_in_pool(1, _recompute, Layout(), kind)[0] for kind in (None, "full", "selective")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert losses[0][0] != losses[0][-1]


def test_ranks_hear_of_an_adapter_of_other_sizes(tmp_path):
    truth("qwen3")["first"].save_pretrained(tmp_path)
    with pytest.raises(RankError, match="The adapter's update of .* has shapes"):
        run_ranks(2, _wrong_sizes, tmp_path)


def _wrong_sizes(folder: Path) -> None:
    module = AutoModule.from_pretrained(pretrained.new_model("llama")).load_adapter(folder)
    trainer(Layout(tp=2)).predict(module, [])
