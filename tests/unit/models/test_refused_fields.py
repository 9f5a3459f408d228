"""What the torch layers would not do is refused, in words that say what to use instead."""

from dataclasses import replace

import pytest
import torch

from lightning_megatron import BertConfig, Experts, GPTConfig, T5Config
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.build_settings import BuildSettings

SIZES = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32, "seq_length": 8}


@pytest.mark.parametrize(
    ("extra", "instead"),
    [
        ({"gradient_accumulation_fusion": True}, r"Apex.*Kernels\(fused_weight_gradients=True\)"),
        ({"apply_rope_fusion": True}, r"Transformer Engine.*Kernels\(fused_layers=True\)"),
        ({"persist_layer_norm": True}, r"Apex.*Kernels\(fused_layers=True\)"),
        ({"masked_softmax_fusion": True}, "leave it out"),
        ({"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}, r"Kernels\(chunked_loss=True\)"),
        ({"tp_comm_overlap": True}, "layers='transformer_engine'"),
        ({"fp8": "hybrid"}, "would ignore it"),
        ({"cpu_offloading": True}, "recompute='selective'"),
        ({"moe_permute_fusion": True}, "leave it out"),
        ({"cuda_graph_impl": "transformer_engine"}, "use 'local'"),
        ({"softmax_type": "learnable"}, r"as if it were not there.*GPTConfig\(attention_sinks=True\)"),
        ({"multi_latent_attention": True}, "as if it were not there"),
        ({"linear_attention_freq": 2}, "as if it were not there"),
        ({"qk_clip": True}, "qk_layernorm"),
        ({"mrope_section": [2, 1, 1]}, "three dimensions"),
        ({"num_moe_experts": 4}, r"stay dense.*GPTConfig\(experts=Experts\(num="),
        ({"apply_residual_connection_post_layernorm": True}, "megatron-core"),
        ({"bias_activation_fusion": True}, r"no kernel of activation='gelu_tanh'.*Kernels\(fused_layers=True\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("config", [GPTConfig, BertConfig, T5Config])
def test_refused_with_what_to_use_instead(config, extra, instead):
    with pytest.raises(ValueError, match=rf"{config.__name__}\(extra=.*{instead}"):
        config(**SIZES, activation="gelu_tanh", extra=extra)


@pytest.mark.parametrize(
    ("field", "instead"),
    [
        ("moe_router_topk", r"GPTConfig\(experts=Experts\(top_k=...\)\)"),
        ("moe_pad_expert_input_to_capacity", "Leave it"),
    ],
)
def test_fields_of_experts_that_are_arguments_or_not_needed(field, instead):
    with pytest.raises(ValueError, match=rf"extra=.*{field}.*{instead}"):
        GPTConfig(**SIZES, bias=False, experts=Experts(num=4), extra={field: 2})


def test_a_fused_gelu_needs_biases():
    GPTConfig(**SIZES, extra={"bias_activation_fusion": True})
    with pytest.raises(ValueError, match="with biases only"):
        GPTConfig(**SIZES, bias=False, extra={"bias_activation_fusion": True})


@pytest.mark.parametrize("extra", [{"fp8": None}, {"apply_rope_fusion": False}, {"bias_dropout_fusion": True}], ids=str)
def test_what_does_not_ask_for_them_is_not_refused(extra):
    assert GPTConfig(**SIZES, extra=extra).extra == extra


def test_transformer_engine_layers_take_its_fields():
    assert GPTConfig(**SIZES, layers="transformer_engine", extra={"fp8": "hybrid"}).extra


def test_a_residual_of_another_type_is_refused_where_weights_are_not_fp32():
    config = GPTConfig(**SIZES, extra={"fp32_residual_connection": True})
    settings = BuildSettings(layout=ParallelLayout(world_size=1))
    assert config.transformer_config(settings).fp32_residual_connection
    with pytest.raises(ValueError, match="fp32_residual_connection.*here bfloat16.*32-true"):
        config.transformer_config(replace(settings, params_dtype=torch.bfloat16))
