"""How large the layers of experts are on a rank: their weights, what they keep of a micro-batch, and what a token uses.

Tokens are counted as if all experts had equally many.
"""

from __future__ import annotations

from typing import Any

from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.parameter_counts import Part


def layers_with_experts(config: Any, part: Part) -> int:
    """How many of these layers have experts."""
    experts = getattr(config, "experts", None)
    if experts is None:
        return 0
    return sum(experts.in_layers(config.num_layers)[part.first : part.first + part.layers])


def ends_with_experts(config: Any) -> bool:
    """Whether the last layer has experts; those of multi-token prediction are as it is."""
    experts = getattr(config, "experts", None)
    return experts is not None and bool(experts.in_layers(config.num_layers)[-1])


def routed_weights(config: Any, layout: ParallelLayout) -> int:
    """The weights of a layer's experts on a rank, without those that all tokens share."""
    experts = config.experts
    return experts.num // layout.ep * _weights_of_one(config, _width(config) // layout.expert_tp)


def layer_weights(config: Any, layout: ParallelLayout) -> int:
    """The weights of a layer's experts, shared ones and their gate, and router on a rank."""
    experts = config.experts
    shared = _weights(config, (experts.shared_ffn_hidden_size or 0) // layout.tp)
    return routed_weights(config, layout) + shared + (experts.num + experts.shared_gate) * config.hidden_size


def unused_weights(config: Any) -> int:
    """The weights of a layer's experts that a token does not use."""
    return (config.experts.num - config.experts.top_k) * _weights_of_one(config, _width(config))


def kept_bytes(
    config: Any, layout: ParallelLayout, tokens: float, element: int, *, recomputes_activation: bool = False
) -> float:
    """What a layer of experts keeps for the backward pass; its input, a norm's output, is counted there.

    An expert keeps its tokens, the activation's input (twice as wide if it is gated) and its output; where it is not
    SwiGLU, also the output before the router's weights, which are fp32, and of a gate the activated half. Shared
    experts keep both halves of a gate, as a dense layer does.

    Args:
        config: The configuration.
        layout: The parallel sizes.
        tokens: Tokens of a micro-batch that the rank has between its tensor-parallel blocks.
        element: Bytes of a number in the weights' type.
        recomputes_activation: Whether the activation is computed again, which shared experts' is not.
    """
    experts, gated = config.experts, config.is_gated
    received = tokens_of_experts(config, layout, tokens)
    numbers = 2 if gated else 1
    if not recomputes_activation:
        numbers = 3 if config.activation == "swiglu" else 5 if gated else 2 if config.activation == "relu" else 3
    kept = received * (config.hidden_size + numbers * _width(config) / layout.expert_tp) * element
    kept += received * (4 + 8)  # weights and places
    shared = tokens * layout.tp if layout.uses_sequence_parallel else tokens
    numbers = 5 if gated else 1 if config.activation == "relu" else 2
    kept += shared * (experts.shared_ffn_hidden_size or 0) / layout.tp * numbers * element
    if experts.shared_gate:
        kept += tokens * (config.hidden_size + 2) * element  # what is multiplied by the gate
    return kept + tokens * _router_bytes(experts)


def output_bytes(config: Any, layout: ParallelLayout, tokens: float, element: int) -> float:
    """The activation's output, and of a gate that is not SwiGLU what it keeps, where it is computed again."""
    numbers = 3 if config.is_gated and config.activation != "swiglu" else 1
    return tokens_of_experts(config, layout, tokens) * numbers * _width(config) / layout.expert_tp * element


def tokens_of_experts(config: Any, layout: ParallelLayout, tokens: float) -> float:
    """The tokens that a rank's experts get, of ``tokens`` of each rank."""
    experts = config.experts
    return tokens * min(1.0, experts.capacity_factor or 1.0) * experts.top_k * layout.expert_tp


def _router_bytes(experts: Any) -> float:
    """What the router keeps of a token: scores of each expert in fp32, for each of its losses again; its choices."""
    scores = 4 + (4 if experts.z_weight else 0) + (4 if experts.balancing.endswith("aux") else 0)
    return experts.num * (scores + 1) + experts.top_k * (8 + 4)


def _weights(config: Any, width: int) -> int:
    return int(config.hidden_size * width * (3 if config.is_gated else 2))


def _weights_of_one(config: Any, width: int) -> int:
    """Those of one expert, which has biases where linear layers have them."""
    biases = (2 if config.is_gated else 1) * width + config.hidden_size
    return _weights(config, width) + biases * int(config.family_arguments().get("add_bias_linear", True))


def _width(config: Any) -> int:
    return int(config.sizes()["experts"]["ffn_hidden_size"])
