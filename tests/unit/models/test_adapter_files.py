"""An adapter's directory gives what ``peft`` gives of it, field by field, or the field is named."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightning_megatron import AutoModule, LoRA
from lightning_megatron.models.lora import peft_files
from tests.reference import pretrained

IDS = pretrained.samples("llama")[0]["input_ids"][None]
TARGETS = ["q_proj", "down_proj"]

# What changes an adapter in peft, and not here.
REFUSED: dict[str, Any] = {
    "bias": "lora_only",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "trainable_token_indices": [1, 2],
    "use_dora": True,
    "velora_config": {"rank": 1},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 8},
    "layer_replication": [[0, 1], [0, 2]],
    "lora_bias": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1e-4},
}
STARTS = ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica"]


def save(folder: Path, name: str = "llama", saving: dict[str, Any] | None = None, **options: Any) -> peft.PeftModel:
    """An adapter as peft writes it, every tensor of it drawn."""
    torch.manual_seed(4)
    about = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})
    model = peft.get_peft_model(copy.deepcopy(pretrained.new_model(name)), about)
    for key, parameter in model.named_parameters():
        if "lora_" in key or "modules_to_save" in key:
            parameter.data += torch.randn_like(parameter) * 0.1
    if saving:
        model.get_base_model().get_input_embeddings().weight.data += 0.1
    model.save_pretrained(folder, **saving or {})
    return model


@torch.no_grad()
def logits(folder: Path, name: str = "llama") -> list[torch.Tensor]:
    """peft's, and ours."""
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pretrained.new_model(name)), folder).eval()
    ours = AutoModule.from_pretrained(pretrained.new_model(name)).load_adapter(folder).build()
    return [theirs(IDS).logits, ours(input_ids=IDS)]


def change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_every_field_of_peft_is_known():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= peft_files._READ | peft_files._WITHOUT_EFFECT | REFUSED.keys()
    assert not (peft_files._READ | peft_files._WITHOUT_EFFECT) & REFUSED.keys()


def test_a_field_without_a_counterpart_is_named(tmp_path):
    save(tmp_path)
    about = (tmp_path / "adapter_config.json").read_text()
    peft_files.read(tmp_path)
    for name, value in {**REFUSED, "of_a_later_version": True}.items():
        change(tmp_path, **{name: value})
        with pytest.raises(ValueError, match=rf"{name}=.*, for which there is no counterpart here"):
            peft_files.read(tmp_path)
        (tmp_path / "adapter_config.json").write_text(about)
    for start in STARTS:
        change(tmp_path, init_lora_weights=start)
        with pytest.raises(
            ValueError, match=f"init_lora_weights='{start}', by which peft (changes|freezes).*merge_and"
        ):
            peft_files.read(tmp_path)
    change(tmp_path, peft_type="IA3")
    with pytest.raises(ValueError, match="of kind 'IA3'"):
        peft_files.read(tmp_path)


def test_why_pissa_is_refused(tmp_path):
    """peft changes the model at each load; when it no longer does, the refusal can go."""
    save(tmp_path, init_lora_weights="pissa")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pretrained.new_model("llama")), tmp_path)
    weight = theirs.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert (weight - pretrained.new_model("llama").model.layers[0].self_attn.q_proj.weight).abs().max() > 0.1


CASES: dict[str, dict[str, Any]] = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "drawn": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "all but one": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "expression": {"target_modules": r".*layers\.\d\.(mlp\.up|self_attn\.[kv])_proj"},
    "all linear": {"target_modules": "all-linear"},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"]},
    "output": {"modules_to_save": ["head"]},  # which "lm_head" ends with
    "embeddings beside": {"saving": {"save_embedding_layers": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_pefts(case, tmp_path):
    save(tmp_path, **CASES[case])
    theirs, ours = logits(tmp_path)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (theirs - pretrained.new_model("llama")(IDS).logits).abs().max() > 0.1


def test_embeddings_that_are_saved_beside_stay_frozen(tmp_path):
    save(tmp_path, saving={"save_embedding_layers": True}, modules_to_save=["lm_head"])
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "adapter_model.safetensors")
    module = AutoModule.from_pretrained(pretrained.new_model("llama")).load_adapter(tmp_path).build()
    trained = {name for name, p in module.chunks.named_parameters() if p.requires_grad and "_lora" not in name}
    assert trained == {"0.output_layer.weight"}


def test_tied_embeddings_come_as_one(tmp_path):
    """As peft saves them beside the updates, or trains them as one."""
    save(tmp_path / "beside", "qwen3", saving={"save_embedding_layers": True})
    theirs, ours = logits(tmp_path / "beside", "qwen3")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    save(tmp_path / "tied", "qwen3", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    theirs, ours = logits(tmp_path / "tied", "qwen3")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_pickled_adapter_is_read_and_a_strange_tensor_named(tmp_path):
    save(tmp_path)
    theirs, _ = logits(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    ours = AutoModule.from_pretrained(pretrained.new_model("llama")).load_adapter(tmp_path).build()
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS), theirs, rtol=0, atol=1e-4)
    save(tmp_path / "embedding", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match="embed_tokens.lora_embedding_A, a part of an update"):
        peft_files.read(tmp_path / "embedding")


def test_a_directory_with_an_adapter_is_the_model_and_the_adapter(tmp_path):
    base, both, alone = tmp_path / "base", tmp_path / "both", tmp_path / "alone"
    for folder in (base, both):
        pretrained.new_model("llama").save_pretrained(folder)
    for folder in (both, alone):
        save(folder)
        change(folder, base_model_name_or_path=str(base))
    for folder in (both, alone):
        with torch.no_grad():
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
            ours = AutoModule.from_pretrained(folder).build()(input_ids=IDS)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (theirs - pretrained.new_model("llama")(IDS).logits).abs().max() > 0.1
    with pytest.raises(ValueError, match="is an adapter with its own updates, and lora=LoRA"):
        AutoModule.from_pretrained(both, lora=LoRA())
    with pytest.raises(ValueError, match="is an adapter, and adapter='x' another"):
        AutoModule.from_pretrained(both, adapter="x")
    change(alone, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not say what it is an adapter of"):
        AutoModule.from_pretrained(alone)


@pytest.mark.parametrize(("name", "leaves"), [("mixtral", "w1 w3 w2"), ("qwen3_moe", "gate_proj up_proj down_proj")])
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_experts_that_were_layers_of_their_own(name, leaves, rslora, tmp_path):
    """As adapters of transformers before 5 have them; the last expert's output has no update."""
    rank, scale = 4, 6 / (2 if rslora else 4)
    merged, tensors = copy.deepcopy(pretrained.new_model(name)).eval(), {}
    draw = torch.Generator().manual_seed(3)

    def update(key: str, weight: torch.Tensor) -> None:
        down, up = (
            torch.randn(size, generator=draw) * 0.3 for size in ((rank, weight.size(1)), (weight.size(0), rank))
        )
        tensors[f"base_model.model.{key}.lora_A.weight"], tensors[f"base_model.model.{key}.lora_B.weight"] = down, up
        weight += scale * up @ down

    with torch.no_grad():
        for number, layer in enumerate(merged.model.layers):
            at = f"model.layers.{number}."
            update(f"{at}self_attn.q_proj", layer.self_attn.q_proj.weight)
            if not hasattr(layer.mlp, "experts"):
                continue
            block = at + ("block_sparse_moe" if name == "mixtral" else "mlp")
            for expert, (both, last) in enumerate(
                zip(layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, strict=True)
            ):
                for leaf, weight in zip(leaves.split(), (*both.chunk(2), last), strict=True):
                    if weight is not last or expert + 1 < len(layer.mlp.experts.down_proj):
                        update(f"{block}.experts.{expert}.{leaf}", weight)
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        about = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "use_rslora": rslora, "bias": "none"}
        (tmp_path / "adapter_config.json").write_text(json.dumps(about))
        ours = AutoModule.from_pretrained(pretrained.new_model(name)).load_adapter(tmp_path).build().eval()
        assert (ours.lora.rank, ours.lora.scale) == (2 * rank, pytest.approx(scale))
        found = ours.chunks[0](IDS, None, None)[..., : ours.config.vocab_size]
        torch.testing.assert_close(found, merged(IDS).logits, rtol=0, atol=1e-4)


def test_what_peft_makes_of_the_names_of_former_layers(tmp_path):
    save(tmp_path, "mixtral", target_modules=["q_proj", "w1", "w2", "w3"])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    theirs, ours = logits(tmp_path, "mixtral")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
