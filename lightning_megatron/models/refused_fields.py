"""Refuses what ``extra=`` asks of libraries that ``layers="torch"`` does not use, and what it would ignore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_FUSED_LAYERS = "MegatronStrategy(kernels=Kernels(fused_layers=True))"
_CHUNKED_LOSS = "MegatronStrategy(kernels=Kernels(chunked_loss=True))"
_TE_LAYERS = "layers='transformer_engine', where it is installed"


class _Refused(NamedTuple):
    """A setting, why the torch layers do not have it, and what to use instead."""

    value: Any
    why: str
    instead: str


_APEX = "is a kernel of Apex"
_TE = "is made for the layers of Transformer Engine"
_TE_KERNEL = "is a kernel of Transformer Engine"
# Fields and the values that are refused; ... stands for every value but False and None.
_TABLE: dict[str, _Refused] = {
    "gradient_accumulation_fusion": _Refused(
        True, _APEX, "use MegatronStrategy(kernels=Kernels(fused_weight_gradients=True))"
    ),
    "apply_rope_fusion": _Refused(True, _TE_KERNEL, f"use {_FUSED_LAYERS}"),
    "fused_single_qkv_rope": _Refused(True, _TE_KERNEL, f"use {_FUSED_LAYERS}"),
    "persist_layer_norm": _Refused(True, _APEX, f"use {_FUSED_LAYERS}"),
    "masked_softmax_fusion": _Refused(
        True, "fuses a softmax that torch's attention does not compute by itself", "leave it out"
    ),
    "use_te_activation_func": _Refused(True, _TE_KERNEL, f"use {_FUSED_LAYERS}"),
    "use_te_rng_tracker": _Refused(True, _TE, "leave it out"),
    "tp_comm_overlap": _Refused(True, _TE, f"leave it out, or use {_TE_LAYERS}"),
    "fp8": _Refused(..., _TE, f"use {_TE_LAYERS}; these layers would ignore it and compute in the Trainer's precision"),
    "fp4": _Refused(..., _TE, f"use {_TE_LAYERS}; these layers would ignore it and compute in the Trainer's precision"),
    "cpu_offloading": _Refused(True, _TE, "use MegatronStrategy(recompute='selective') or 'full'"),
    "delay_wgrad_compute": _Refused(True, _TE, f"leave it out, or use {_TE_LAYERS}"),
    "symmetric_ar_type": _Refused(..., _TE, f"leave it out, or use {_TE_LAYERS}"),
    "use_kitchen": _Refused(True, "needs the package nvidia-kitchen and Transformer Engine", "leave it out"),
    "use_kitchen_attention": _Refused(True, "needs the package nvidia-kitchen", "leave it out"),
    "moe_permute_fusion": _Refused(True, _TE_KERNEL, "leave it out"),
    "moe_router_fusion": _Refused(True, _TE_KERNEL, "leave it out"),
    "cuda_graph_impl": _Refused("transformer_engine", _TE, "use 'local'"),
}
# What else the torch layers would ignore, and train another model than was asked for, without an error.
_EXPERTS = "use GPTConfig(experts=Experts(num=..., top_k=..., shared_ffn_hidden_size=...))"
_IGNORED_HERE = "the torch layers compute attention as if it were not there"
_TABLE |= {
    name: _Refused(value, why, instead)
    for name, value, why, instead in (
        (
            "multi_latent_attention",
            True,
            f"changes attention, and {_IGNORED_HERE}",
            "use GPTConfig(latent_attention=LatentAttention(...))",
        ),
        ("experimental_attention_variant", ..., f"changes attention, and {_IGNORED_HERE}", "leave it out"),
        ("linear_attention_freq", ..., f"changes attention, and {_IGNORED_HERE}", "leave it out"),
        ("qk_clip", True, f"clips the scores of attention, and {_IGNORED_HERE}", "use extra={'qk_layernorm': True}"),
        ("log_max_attention_logit", True, f"watches the scores of attention, and {_IGNORED_HERE}", "leave it out"),
        ("num_moe_experts", ..., "is the number of experts, and the torch layers would stay dense", _EXPERTS),
        ("moe_shared_expert_intermediate_size", ..., "is of mixtures of experts, and here is none", _EXPERTS),
        ("mrope_section", ..., "is of rotary positions in three dimensions, which no model here has", "leave it out"),
        ("apply_residual_connection_post_layernorm", True, "is ignored by megatron-core's own layers", "leave it out"),
    )
}
_FUSED_ACTIVATIONS = ("gelu", "swiglu", "geglu")  # megatron-core's kernels: of gelu they compute the tanh formula


def refuse_fields(of: str, extra: Mapping[str, Any], activation: str, has_bias: bool) -> None:
    """Refuse fields of megatron-core's configuration that ``layers="torch"`` does not have.

    Args:
        of: Name of the configuration's class; the error begins with it.
        extra: The fields.
        activation: The configuration's activation.
        has_bias: Whether the feed-forward layer has biases.

    Raises:
        ValueError: A field that needs Apex or Transformer Engine, or does not fit the activation.
    """
    for name, (refused, why, instead) in _TABLE.items():
        value = extra.get(name)
        if value == refused or (refused is ... and value not in (None, False)):
            _refuse(of, name, value, why, instead)
    if extra.get("softmax_type", "vanilla") != "vanilla":
        _refuse(
            of,
            "softmax_type",
            extra["softmax_type"],
            f"adds to the softmax, and {_IGNORED_HERE}",
            f"use GPTConfig(attention_sinks=True), which is 'learnable', or {_TE_LAYERS}",
        )
    if extra.get("cross_entropy_loss_fusion") and extra.get("cross_entropy_fusion_impl") == "te":
        _refuse(of, "cross_entropy_fusion_impl", "te", _TE_KERNEL, f"use {_CHUNKED_LOSS}")
    if extra.get("bias_activation_fusion") and not {"activation_func", "gated_linear_unit"} & extra.keys():
        if activation not in _FUSED_ACTIVATIONS:
            why = f"has no kernel of activation={activation!r} (those are {', '.join(_FUSED_ACTIVATIONS)})"
            _refuse(of, "bias_activation_fusion", True, why, f"use {_FUSED_LAYERS}, which takes every activation")
        if activation == "gelu" and not (extra.get("add_bias_linear", has_bias)):
            why = "has a kernel of activation='gelu' with biases only, and there are none"
            _refuse(of, "bias_activation_fusion", True, why, f"use {_FUSED_LAYERS}")


def _refuse(of: str, name: str, value: Any, why: str, instead: str) -> None:
    raise ValueError(f"{of}(extra={{{name!r}: {value!r}}}): it {why}. Instead, {instead}.")
