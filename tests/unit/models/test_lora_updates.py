"""Low-rank updates on one process: what they hold, what has no place, and what goes to peft and comes back."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from lightning_megatron import AutoModule, GPTModule, LoRA
from tests.reference import plain_experts, pretrained
from tests.reference.peft_lora import TARGETS, truth


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
    with pytest.raises(ValueError, match=r"with task='masked_lm'.*:\n  classifier.bias\n  classifier.weight"):
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


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("llama", "CAUSAL_LM"),
        ("t5", "SEQ_2_SEQ_LM"),
        ("bert-masked", "FEATURE_EXTRACTION"),
        ("bert-sequences", "SEQ_CLS"),
        ("bert-tokens", "TOKEN_CLS"),
        ("llama-sequences", "SEQ_CLS"),
        ("gpt2-tokens", "TOKEN_CLS"),
        ("bert-answers", "QUESTION_ANS"),
    ],
)
def test_an_adapter_says_its_task(name, task):
    assert AutoModule.from_pretrained(pretrained.new_model(name)).config.peft_task == task


def test_targets_without_effect_are_refused_in_a_mixture():
    router = LoRA(targets=["router"])
    with pytest.raises(ValueError, match=r"router of experts.*also_train=\['decoder.layers.0.mlp.router'"):
        GPTModule(plain_experts.MIXTURE, lora=router).build()
    with pytest.raises(ValueError, match="no layer is called 'mlp.linear_fc1'"):  # all layers have experts
        GPTModule(plain_experts.MIXTURE, lora=LoRA(targets=["mlp.linear_fc1"])).build()


def test_all_linear_layers_of_a_mixture_have_updates():
    module = GPTModule(plain_experts.ODD, lora=LoRA(rank=4, dropout=0.5)).build()
    updated = {name.partition("_lora.")[0] for name, p in module.chunks.named_parameters() if p.requires_grad}
    kinds = {name.partition("layers.")[2].partition(".")[2] for name in updated}
    layers = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
    layers += [f"mlp.{kind}.linear_{name}" for kind in ("experts", "shared_experts") for name in ("fc1", "fc2")]
    assert kinds == set(layers)
    for key, parameter in module.chunks.named_parameters():
        if key.endswith(".B") and ".experts." in key:
            torch.nn.init.normal_(parameter.data)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(module(input_ids=ids), module(input_ids=ids))
        module.train()
        assert not torch.equal(module(input_ids=ids), module(input_ids=ids))


def test_updates_that_peft_takes_for_those_of_experts_are_told(tmp_path):
    model = pretrained.new_model("deepseek_v3")
    module = AutoModule.from_pretrained(model, lora=LoRA(rank=2)).build()
    with pytest.warns(UserWarning, match=r"(?s)peft cannot load .*\n  model.layers.\d.mlp.shared_experts.up_proj"):
        module.save_adapter(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    again = AutoModule.from_pretrained(model).load_adapter(tmp_path).build()
    updates = {key: value for key, value in module.state_dict().items() if "_lora" in key}
    assert updates.keys() == {key for key in again.state_dict() if "_lora" in key}
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in updates.items())
