"""Translates the sizes of a configuration, which Llama and many families after it name alike."""

from __future__ import annotations

from typing import Any

from lightning_megatron.hf.config_reader import Fields


def read(fields: Fields) -> dict[str, Any]:
    """Arguments of ``GPTConfig``: sizes, dropout of attention weights, and whether embeddings are tied."""
    return {
        "num_layers": fields("num_hidden_layers"),
        "hidden_size": fields("hidden_size"),
        "num_attention_heads": fields("num_attention_heads"),
        "num_query_groups": fields("num_key_value_heads"),
        "ffn_hidden_size": fields("intermediate_size"),
        "vocab_size": fields("vocab_size"),
        "seq_length": fields("max_position_embeddings"),
        "attention_dropout": fields("attention_dropout"),
        "tie_embeddings": fields("tie_word_embeddings"),
    }


def written(config: Any) -> dict[str, Any]:
    """Their fields of a ``GPTConfig``."""
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups or config.num_attention_heads,
        "intermediate_size": config.ffn_hidden_size or 4 * config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.seq_length,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }
