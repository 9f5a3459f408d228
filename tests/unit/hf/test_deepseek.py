"""DeepSeek-V2 and V3: their settings, what is left out, what cannot go out, and updates of their linear layers."""

from dataclasses import replace

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from lightning_megatron import AutoModule, LatentAttention, LoRA
from lightning_megatron.hf import UnsupportedConfigError, family_of
from tests.reference import hub_models

LITE, V3 = "deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V3"


def test_settings(tmp_path):
    lite = AutoModule.from_pretrained(hub_models.write(LITE, tmp_path / "lite")).config
    sizes = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "norm_epsilon": 1e-6}
    assert lite.latent_attention == LatentAttention(**sizes)
    assert (lite.experts.router, lite.experts.normalize_top_k, lite.experts.groups) == ("softmax", False, None)
    assert (lite.experts.layers, lite.experts.shared_ffn_hidden_size) == ([1, 2, 3, 4], 32)
    with pytest.warns(UserWarning, match=r"\d+ tensors are left out, those of the layers that predict further tokens"):
        module = AutoModule.from_pretrained(
            hub_models.write(V3, tmp_path / "v3"), config={"experts": {"bias_rate": 1e-3}}
        )
    experts = module.config.experts
    assert (experts.balancing, experts.bias_rate, experts.scale) == ("bias", 1e-3, 2.5)
    assert (experts.groups, experts.top_k_groups, experts.group_scores) == (3, 2, 2)
    module.save_pretrained(tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not [name for name in names if name.startswith("model.layers.5.")]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"latent_attention": None}, "latent_attention=None"),
        ({"experts": {"layers": [0, 2]}}, "all layers but the first ones"),
        ({"experts": {"shared_ffn_hidden_size": 7}}, "a multiple of 16"),
        ({"experts": {"scale": 2.0, "capacity_factor": 1.0}}, "capacity_factor=1.0"),
        ({"experts": {"router": "sigmoid", "normalize_top_k": True}}, "router='sigmoid'"),
    ],
    ids=str,
)
def test_what_cannot_go_out(change, told, tmp_path):
    config = AutoModule.from_pretrained(hub_models.write(LITE, tmp_path / "lite")).config
    experts = replace(config.experts, **(change.pop("experts", {})))
    with pytest.raises(UnsupportedConfigError, match=told):
        family_of("deepseek_v2").written(replace(config, experts=experts, **change))


@pytest.mark.parametrize("name", [LITE, V3])
def test_updates_of_latent_attention_are_pefts(name, tmp_path):
    """All layers of the attention are updated; peft gives the same logits, merged and beside the weights."""
    source = hub_models.write(name, tmp_path / "source")
    projections = ["q_proj"] if name == LITE else ["q_a_proj", "q_b_proj"]
    targets = [*projections, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    module = AutoModule.from_pretrained(source, lora=LoRA(rank=2, targets=targets)).build()
    torch.manual_seed(0)
    updates = [weight for key, weight in module.named_parameters() if "_lora" in key]
    for weight in updates:
        torch.nn.init.normal_(weight.data, std=0.3)
    module.save_adapter(tmp_path / "adapter")
    module.save_pretrained(tmp_path / "merged")
    theirs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(theirs) == 2 * 5 * len(targets)
    ids = torch.arange(2, 16).view(2, 7)
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        ours = module.chunks[0](ids, None, None)[..., : module.config.vocab_size]
        beside = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(ours, beside, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [LITE, V3])
def test_texts_are_those_of_transformers(name, tmp_path):
    """Greedily and by beams, of prompts that are padded; the weights are large, so that attention chooses."""
    theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(hub_models.write(name, tmp_path / "source")).float().eval()
    )
    theirs.generation_config = transformers.GenerationConfig()
    torch.manual_seed(0)
    for weight in theirs.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight.data, std=0.3)
    ours = AutoModule.from_pretrained(theirs).build()
    ids, keep = torch.randint(2, 30, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    keep[0, :3] = 0
    common = {"attention_mask": keep, "max_new_tokens": 16, "pad_token_id": 0}
    for options in ({}, {"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": 5}):
        assert torch.equal(ours.generate(ids, **common, **options), theirs.generate(ids, **common, **options)), options
