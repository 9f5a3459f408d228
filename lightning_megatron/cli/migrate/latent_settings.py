"""Megatron-LM's settings of multi-latent attention, which are ``LatentAttention`` in a GPT's configuration here."""

from __future__ import annotations

import math
from typing import Any

from lightning_megatron.cli.migrate.model_settings import is_gpt
from lightning_megatron.cli.migrate.plan import Fate, Given, Plan, take
from lightning_megatron.cli.migrate.settings_table import CONFIG

_PLACE, _SCALING = f"{CONFIG}.latent_attention", f"{CONFIG}.rope_scaling"
# Our name of each size, and Megatron-LM's default.
_SIZES: dict[str, tuple[str, int | None]] = {
    "q_lora_rank": ("q_lora_rank", None),
    "kv_lora_rank": ("kv_lora_rank", 32),
    "qk_head_dim": ("qk_nope_head_dim", 128),
    "qk_pos_emb_head_dim": ("qk_rope_head_dim", 64),
    "v_head_dim": ("v_head_dim", 128),
}
_STRETCH = ("rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim")
# megatron-core's own, which no option changes.
_YARN = {"original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
# What other attention has: where it would stand here, and what becomes of it.
_OF_OTHERS: dict[str, tuple[Fate, str]] = {
    "kv_channels": ("not needed", "multi-latent attention has sizes of heads of its own"),
    "qkv_bias": ("not needed", "multi-latent attention has no biases before its output"),
    "num_query_groups": ("not here", "multi-latent attention makes keys and values for each head"),
    "rotary_percent": ("not here", "LatentAttention(qk_rope_head_dim=) says how many channels are rotated"),
    "extra.rotary_interleaved": ("not here", "LatentAttention(rope_interleave=) has pairs as Megatron-LM's layer does"),
    "extra.qk_layernorm": ("carried over", "norms of the latents, which LatentAttention always has"),
    "rope_scaling": ("not needed", "multi-latent attention has rotary_scaling_factor"),
}


def latent_attention(given: Given, plan: Plan) -> None:
    """Carry over the multi-latent attention of a GPT that is built from its sizes.

    Args:
        given: All settings, by Megatron's names, with their values read.
        plan: The run in the making.
    """
    name = "multi_latent_attention"
    every = (name, *_SIZES, *_STRETCH)
    if not given.get(name):
        take(given, plan, every, f"Megatron-LM looks at it only with {name}", fate="not needed")
        return
    if not is_gpt(plan):
        take(given, plan, every, "only a GPT that is built from its sizes has it as a setting", fate="not here")
        return
    for place, (fate, says) in _OF_OTHERS.items():
        value = plan.get(f"{CONFIG}.{place}")
        asks = value not in (None, False) and (place, value) != ("rotary_percent", 1.0)
        if value is not None:
            plan.take_back(f"{CONFIG}.{place}", fate if asks else "not needed", says)
    if plan.get(f"{CONFIG}.layers") == "transformer_engine":
        says = "layers of multi-latent attention are PyTorch's, with the same numbers"
        plan.take_back(f"{CONFIG}.layers", "not needed", says)
    take(given, plan, (name,), "LatentAttention", _PLACE)
    take(given, plan, tuple(_SIZES), lambda theirs: f"LatentAttention({_SIZES[theirs][0]}=)", _PLACE)
    sizes = {ours: given.get(theirs) or usual for theirs, (ours, usual) in _SIZES.items()}
    plan.put(_PLACE, {ours: size for ours, size in sizes.items() if size is not None})
    if not given.get("qk_layernorm"):
        plan.say(name, True, "not here", "without qk_layernorm Megatron-LM has no norms of latents, and here they do")
    _positions(given, plan)
    _stretch(given, plan)


def _positions(given: Given, plan: Plan) -> None:
    """Megatron-LM rotates a part of each head, whatever positions are added to the embeddings."""
    kind = given.get("position_embedding_type")
    plan.put(f"{CONFIG}.position_embedding", "rope")
    if kind not in ("rope", "none") and not given.get("use_rotary_position_embeddings"):
        says = "beside multi-latent attention there are no learned positions; use rope or none"
        plan.say("position_embedding_type", kind or "learned_absolute", "not here", says)


def _stretch(given: Given, plan: Plan) -> None:
    """YaRN, by transformers' names; of its factors Megatron-LM takes any, and transformers those that are not 0."""
    factor, kind = given.get("rotary_scaling_factor") or 1.0, given.get("rope_type") or "yarn"
    if factor == 1.0 or kind != "yarn":
        fate: Fate = "not here" if factor != 1.0 and given.get("mscale_all_dim") else "not needed"
        take(given, plan, _STRETCH, "YaRN alone stretches, by a rotary_scaling_factor above 1", fate=fate)
        return
    take(given, plan, _STRETCH, "config.rope_scaling", _SCALING)
    mscale, of_scores = given.get("mscale", 1.0), given.get("mscale_all_dim", 0.0)
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor, **_YARN}
    if mscale and of_scores:
        scaling |= {"mscale": mscale, "mscale_all_dim": of_scores}
    else:
        scaling["attention_factor"] = _magnitude(factor, mscale) / _magnitude(factor, of_scores)
        scaling |= {"mscale_all_dim": of_scores} if of_scores else {}
    plan.put(_SCALING, scaling)


def _magnitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0
