"""Multi-latent attention writes texts with a cache as without one, and refuses what it does not have."""

from dataclasses import replace

import pytest
import torch

from lightning_megatron import Experts, GPTConfig, GPTModule, LatentAttention, LayoutError, LoRA, ParallelLayout
from lightning_megatron.models.generation.kv_cache import KeyValueCache
from tests.reference import plain_gpt


def written(config: GPTConfig, lora: LoRA | None = None) -> GPTModule:
    """A model of drawn weights."""
    module = GPTModule(config, lora=lora).build()
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter.data, std=0.3)
    return module


UPDATES = LoRA(rank=2, targets=["linear_kv_up_proj", "linear_proj"])


@pytest.mark.parametrize(
    ("name", "change", "lora"),
    [
        ("LATENT", {}, None),
        ("LATENT_LITE", {}, None),
        ("LATENT", {"sliding_window": 6, "sliding_window_layers": [0]}, None),
        ("LATENT", {"rotary_layers": [1]}, None),
        ("LATENT", {}, UPDATES),
    ],
    ids=["LATENT", "LATENT_LITE", "window", "without rotation", "LoRA"],
)
def test_written_with_a_cache_as_without(name: str, change: dict, lora: LoRA | None) -> None:
    config = replace(getattr(plain_gpt, name), seq_length=64, **change)
    module = written(config, lora)
    tokens, keep = torch.randint(1, 60, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    keep[0, :4] = keep[2, :6] = 0
    for text, kept in zip(module.generate(tokens, attention_mask=keep, max_new_tokens=20), keep, strict=True):
        prompt = int(kept.sum())
        alone = text[None, 9 - prompt :]
        with torch.no_grad():
            logits = module.chunks[0](alone, None, None)[..., : config.vocab_size]
        assert torch.equal(logits[0, prompt - 1 : -1].argmax(-1), alone[0, prompt:])


def test_latents_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each token as many numbers as its latent and the rotated key have, however many heads there are."""
    config, kept = replace(plain_gpt.LATENT, seq_length=64), []
    sizes = config.latent_attention
    assert sizes is not None

    class Watched(KeyValueCache):
        def advance(self, tokens: int) -> None:
            super().advance(tokens)
            kept.append([tuple(each.shape) for memories in self.key_value_memory_dict.values() for each in memories])

    monkeypatch.setattr("lightning_megatron.models.generation.decoder.KeyValueCache", Watched)
    written(config).generate(torch.randint(1, 60, (2, 5)), max_new_tokens=3, num_beams=2, eos_token_id=[])
    assert kept[-1] == [(8, 4, 1, sizes.kv_lora_rank + sizes.qk_rope_head_dim)] * config.num_layers


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kv_channels": 8}, "has sizes of heads of its own"),
        ({"num_query_groups": 2}, "makes keys and values for each head"),
        ({"position_embedding": "none", "rope_scaling": None}, "rotates a part of each head"),
        ({"extra": {"qk_layernorm": True}}, "latents have norms of their own"),
        ({"extra": {"rotary_interleaved": True}}, "rope_interleave"),
        ({"latent_attention": {"kv_lora_rank": 8, "kv_rank": 9}}, "did you mean kv_lora_rank|use kv_lora_rank"),
        ({"extra": {"moe_layer_recompute": True}}, "is of mixtures of experts, and here is none"),
        (
            {"experts": {"num": 4}, "extra": {"moe_token_dispatcher_type": "allgather"}},
            r"use MegatronStrategy\(kernels=Kernels\(expert_dispatch=",
        ),
        ({"latent_attention": [8]}, r"latent_attention=\[8\]\): use LatentAttention\(kv_lora_rank=...\), or None"),
        ({"experts": 4}, r"experts=4\): use Experts\(num=..., top_k=...\), or None"),
        ({"experts": {"num": 4, "layers": ["last"]}}, r"layers=\['last'\]\): use a list of numbers of layers, or None"),
        ({"experts": {"num": 4, "layers": 2}}, r"Experts\(layers=2\): use a list of numbers of layers, or None"),
    ],
    ids=str,
)
def test_refused(change: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        replace(plain_gpt.LATENT, **change)


def test_refused_sizes() -> None:
    with pytest.raises(ValueError, match=r"qk_rope_head_dim=7.*Use 8"):
        LatentAttention(qk_rope_head_dim=7)
    with pytest.raises(LayoutError, match=r"kv_lora_rank \+ qk_rope_head_dim=28 is not a multiple of tp=3"):
        plain_gpt.LATENT.check(ParallelLayout(world_size=3, tp=3))


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ({"groups": 3}, "give both"),
        ({"groups": 4, "top_k_groups": 2}, "Use a divisor"),
        ({"groups": 3, "top_k_groups": 1, "top_k": 3}, "top_k up to 2"),
        ({"groups": 3, "top_k_groups": 2, "group_scores": 3}, "group_scores up to 2"),
    ],
    ids=str,
)
def test_refused_groups_of_experts(groups: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Experts(num=6, **groups)
