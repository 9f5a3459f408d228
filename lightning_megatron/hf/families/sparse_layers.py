"""Translates which layers of a Qwen have experts, and how wide these are."""

from __future__ import annotations

from typing import Any

from lightning_megatron.hf.config_reader import Fields


def read(fields: Fields) -> dict[str, Any]:
    """Arguments of ``Experts``."""
    dense, step = fields("mlp_only_layers"), fields("decoder_sparse_step")
    count = fields("num_hidden_layers")
    layers = [number for number in range(count) if number not in dense and (number + 1) % step == 0]
    return {"ffn_hidden_size": fields("moe_intermediate_size"), "layers": None if len(layers) == count else layers}


def written(config: Any) -> dict[str, Any]:
    """Their fields of a ``GPTConfig`` with experts."""
    width = config.ffn_hidden_size or 4 * config.hidden_size
    has_experts = config.experts.in_layers(config.num_layers)
    return {
        "moe_intermediate_size": config.experts.ffn_hidden_size or width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [number for number, has in enumerate(has_experts) if not has],
    }
