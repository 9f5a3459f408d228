"""Translates the sizes of a configuration, which BERT, Llama and many families after them name alike."""

from __future__ import annotations

from typing import Any

from lightning_megatron.hf.config_reader import Fields


def read_shape(fields: Fields) -> dict[str, Any]:
    """Arguments of a configuration: the sizes that every transformer has."""
    return {
        "num_layers": fields("num_hidden_layers"),
        "hidden_size": fields("hidden_size"),
        "num_attention_heads": fields("num_attention_heads"),
        "ffn_hidden_size": fields("intermediate_size"),
        "vocab_size": fields("vocab_size"),
        "seq_length": fields("max_position_embeddings"),
    }


def read(fields: Fields) -> dict[str, Any]:
    """Arguments of ``GPTConfig``: sizes, dropout of attention weights, and whether embeddings are tied."""
    return {
        **read_shape(fields),
        "num_query_groups": fields("num_key_value_heads"),
        "attention_dropout": fields("attention_dropout"),
        "tie_embeddings": fields("tie_word_embeddings"),
    }


def written_shape(config: Any) -> dict[str, Any]:
    """The fields that ``read_shape`` reads, of a configuration."""
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_hidden_size or 4 * config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.seq_length,
    }


def written(config: Any) -> dict[str, Any]:
    """The fields that ``read`` reads, of a ``GPTConfig``."""
    return {
        **written_shape(config),
        "num_key_value_heads": config.num_query_groups or config.num_attention_heads,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }
