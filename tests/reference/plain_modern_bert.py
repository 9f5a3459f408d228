"""transformers' ModernBERTs for ``plain_bert``: how one is made of our configuration, and megatron-core's names."""

from typing import Any

import torch
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
)

from lightning_megatron import BertConfig
from tests.reference.plain_gpt import Weights

SHAPE: dict[str, Any] = {
    "norm_placement": "embedding_pre",
    "num_token_types": 0,
    "position_embedding": "rope",
    "rotary_base": 500.0,
    "window_rotary_base": 20.0,
    "sliding_window": 4,
    "sliding_window_layers": [1, 2, 4, 5, 7],
    "activation": "geglu",
    "ffn_hidden_size": 36,
    "bias": False,
    "norm_bias": False,
    "classifier_head": "transform",
}
_MODELS: dict[str, Any] = {
    "masked_lm": ModernBertForMaskedLM,
    "sequence_classification": ModernBertForSequenceClassification,
    "token_classification": ModernBertForTokenClassification,
}
_NAMES = {
    "model.embeddings.tok_embeddings": "embedding.word_embeddings",
    "model.embeddings.norm": "embedding.layer_norm",
    "model.final_norm": "encoder.final_layernorm",
    "decoder": "output_layer",
    "classifier": "classification_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn.Wo": "self_attention.linear_proj",
    "mlp_norm": "pre_mlp_layernorm",
    "mlp.Wi": "mlp.linear_fc1",
    "mlp.Wo": "mlp.linear_fc2",
}


def new_model(c: BertConfig) -> Any:
    layers = range(c.num_layers)
    kinds = ["sliding_attention" if n in c.sliding_window_layers else "full_attention" for n in layers]
    config = ModernBertConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_attention_heads,
        intermediate_size=c.ffn_hidden_size,
        max_position_embeddings=c.seq_length,
        norm_eps=c.layernorm_epsilon,
        local_attention=2 * c.sliding_window,
        layer_types=kinds,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": c.rotary_base},
            "sliding_attention": {"rope_type": "default", "rope_theta": c.window_rotary_base},
        },
        num_labels=c.num_labels,
        classifier_pooling=c.classifier_pooling,
        pad_token_id=None,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1),
        attn_implementation="eager",
    )
    return _MODELS[c.task](config)


def masks(seen: torch.Tensor, window: int) -> dict[str, torch.Tensor]:
    """What is added to the scores of each kind of layer, where the other layers' queries see ``seen`` ``[b, s, s]``."""
    places = torch.arange(seen.size(1))
    near = (places[:, None] - places).abs() <= window
    return {
        kind: torch.zeros(seen.shape).masked_fill(~each, torch.finfo(torch.float32).min)[:, None]
        for kind, each in (("full_attention", seen), ("sliding_attention", seen & near))
    }


def megatron_weights(model: Any) -> Weights:
    heads, head = model.config.num_attention_heads, "lm_head" if hasattr(model, "decoder") else "transform"
    names = {**_NAMES, "head.dense": f"{head}.dense", "head.norm": f"{head}.layer_norm"}
    for n in range(model.config.num_hidden_layers):
        names |= {f"model.layers.{n}.{a}": f"encoder.layers.{n}.{b}" for a, b in _LAYER_NAMES.items()}
    weights = {}
    for key, value in model.state_dict().items():
        module, _, leaf = key.rpartition(".")
        if module.endswith("Wqkv"):
            layer = module.split(".")[2]
            by_head = value.view(3, heads, -1, value.size(-1)).transpose(0, 1)
            weights[f"encoder.layers.{layer}.self_attention.linear_qkv.{leaf}"] = by_head.flatten(0, 2).clone()
        else:
            weights[f"{names[module]}.{leaf}"] = value.detach().clone()
    return weights
