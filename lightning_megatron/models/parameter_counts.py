"""Counts the weights of one rank's part of a model from its configuration."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.distributed.pipeline_cut import even


@dataclass(frozen=True)
class Part:
    """The layers that one model chunk has of a stack.

    Args:
        stack: Index of the stack among the configuration's ``stacks``.
        layers: The number of layers.
        embeds: Whether the chunk begins with the embedding.
        ends_stack: Whether the stack's final norm is behind the layers.
        ends_model: Whether the output layer is behind that.
        first: The number of the first layer in its stack; ``numbered`` says it.
    """

    stack: int
    layers: int
    embeds: bool = False
    ends_stack: bool = False
    ends_model: bool = False
    first: int = 0


def chunks(layers: int, layout: ParallelLayout, final_norm: bool) -> list[list[Part]]:
    """The model chunks of a single stack, in the order of the virtual stages."""
    cut = layout.layers_per_stage
    counts = cut if isinstance(cut, tuple) and layout.pp > 1 else even(layers, layout.num_stages)
    last = layout.num_stages - 1
    return [
        [
            Part(
                0,
                count,
                embeds=number == 0,
                ends_stack=number == last and final_norm,
                ends_model=number == last,
            )
        ]
        for number, count in enumerate(counts)
    ]


def numbered(chunks: list[list[Part]]) -> list[list[Part]]:
    """The parts of all chunks, each of which knows the number of its first layer."""
    done: Counter[int] = Counter()  # layers of each stack
    found: list[list[Part]] = []
    for chunk in chunks:
        found.append([])
        for part in chunk:
            found[-1].append(replace(part, first=done[part.stack]))
            done[part.stack] += part.layers
    return found


def layer(config: Any, layout: ParallelLayout, attentions: int) -> int:
    """The weights of one layer on a tensor-parallel rank.

    Args:
        config: The configuration.
        layout: The parallel sizes.
        attentions: 1, or 2 with cross-attention.
    """
    settings, sizes, hidden = config.family_arguments(), config.sizes(), config.hidden_size
    bias, qkv_bias = settings.get("add_bias_linear", True), settings.get("add_qkv_bias", True)
    size = config.kv_channels or hidden // config.num_attention_heads
    heads, groups = config.num_attention_heads * size // layout.tp, sizes["num_query_groups"] * size // layout.tp
    latent = getattr(config, "latent_attention", None)
    attention = (hidden + qkv_bias) * (heads + 2 * groups) + hidden * heads + bias * hidden + norm(config)
    if config.extra.get("qk_layernorm"):
        joint = getattr(config, "joint_qk_norm", False)
        normed = config.num_attention_heads + sizes["num_query_groups"] if joint else 2
        attention += normed * size * norm(config) // hidden
    if latent is not None:
        attention = latent.products(hidden, config.num_attention_heads) // layout.tp + bias * hidden + norm(config)
        attention += latent.normed * norm(config) // hidden
    parts = feed_forward(config, layout) + norm(config)
    if getattr(config, "norm_placement", "pre") == "sandwich":
        parts += 2 * norm(config)
    if getattr(config, "shared_norm", False):
        parts -= norm(config)
    return attentions * attention + parts


def feed_forward(config: Any, layout: ParallelLayout) -> int:
    """The weights of a dense layer's feed-forward part on a tensor-parallel rank."""
    hidden, bias = config.hidden_size, config.family_arguments().get("add_bias_linear", True)
    width = (config.ffn_hidden_size or 4 * hidden) // layout.tp
    first = (2 if config.is_gated else 1) * width
    return int((hidden + bias) * first + width * hidden + bias * hidden)


def norm(config: Any) -> int:
    """The weights of a norm over the hidden size."""
    is_layer_norm = config.family_arguments().get("normalization", "LayerNorm") == "LayerNorm"
    return int(config.hidden_size) * (2 if is_layer_norm and getattr(config, "norm_bias", True) else 1)


def vocabulary(config: Any, layout: ParallelLayout) -> int:
    """The weights of a rank's shard of the embedding, or of the output layer."""
    return (
        layout.padded_vocab_size(config.vocab_size, config.make_vocab_size_divisible_by)
        // layout.tp
        * int(config.hidden_size)
    )
