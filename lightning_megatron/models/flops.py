"""Floating-point operations of a model's matrix products: what the mathematics needs, whatever is computed again.

As in Megatron-LM's ``num_floating_point_operations`` and in appendix B of PaLM (arXiv 2204.02311): a product of ``[n,
k]`` and ``[k, m]`` takes ``2·n·k·m``; the backward pass takes twice the forward's. Attention that looks back only needs
half of its scores. Of experts, those count that a token uses, and their router. Norms, activations, softmax and
embeddings are left out.
"""

from __future__ import annotations

from typing import Any

_FORWARD_AND_BACKWARD = 3


def training_flops(config: Any, lengths: tuple[int, ...]) -> float:
    """The floating-point operations of one sequence, forward and backward.

    Args:
        config: A ``ModelConfig``, such as a ``GPTConfig``.
        lengths: Tokens of the sequence; a T5 has two numbers: encoder and decoder.

    Returns:
        Floating-point operations.
    """
    stacks = config.stacks(lengths)
    forward = sum(
        _layer_of(config, stack, None, config.layer_work(stack, n)[1]) for stack in stacks for n in range(stack.layers)
    )
    last = stacks[-1]
    return _FORWARD_AND_BACKWARD * (forward + _outputs(config, last.tokens) + _later_tokens(config, last))


def layer_flops(config: Any) -> list[list[float]]:
    """The floating-point operations of each layer of each stack, forward, of the longest sequence.

    Layers may differ in their attention windows and in whether they have experts.
    """
    return [
        [_layer_of(config, stack, *config.layer_work(stack, number)) for number in range(stack.layers)]
        for stack in config.stacks(config.lengths)
    ]


def _layer_of(config: Any, stack: Any, seen: float | None, weights: int) -> float:
    first, *others = stack.attention
    attention = [first if seen is None else (first[0], seen), *others]
    products = sum(_attention(config, stack.tokens, keys, number) for keys, number in attention)
    return products + 2 * stack.tokens * weights


def head_flops(config: Any) -> float:
    """The floating-point operations of what is behind the last layer, forward, of the longest sequence."""
    last = config.stacks(config.lengths)[-1]
    return _outputs(config, last.tokens) + _later_tokens(config, last)


def _later_tokens(config: Any, stack: Any) -> float:
    """Those of multi-token prediction: for each depth a projection of two hidden states, a layer, and its logits."""
    joins = 2 * stack.tokens * 2 * config.hidden_size**2
    layer = _layer_of(config, stack, None, config.layer_work(stack, stack.layers - 1)[1])  # as the last one
    depths: int = getattr(config, "mtp", 0)
    return depths * (joins + layer + _outputs(config, stack.tokens))


def _attention(config: Any, queries: int, keys: int, seen: float) -> float:
    """Projections of queries, keys, values and outputs; scores and their products with the values."""
    latent, sizes = getattr(config, "latent_attention", None), config.sizes()
    if latent is not None:
        channels = config.num_attention_heads * (latent.qk_head_dim + latent.v_head_dim)
        return 2 * queries * (latent.products(config.hidden_size, config.num_attention_heads) + seen * channels)
    head = config.kv_channels or config.hidden_size // config.num_attention_heads
    heads, groups = config.num_attention_heads * head, sizes["num_query_groups"] * head
    projections = 2 * config.hidden_size * (2 * heads * queries + 2 * groups * keys)
    return projections + 2 * 2 * queries * seen * heads


def _outputs(config: Any, tokens: int) -> float:
    """The output layer over the vocabulary, or over the labels of a head."""
    return 2.0 * tokens * config.hidden_size * config.outputs(config.vocab_size)
