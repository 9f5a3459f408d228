"""The router of experts computes in fp32, and keeps its biases in it, whatever type the model has."""

import torch

from lightning_megatron import GPTModule
from tests.reference.plain_experts import BIASED


def test_a_router_of_a_bf16_model_computes_in_fp32():
    module = GPTModule(BIASED).build(dtype=torch.bfloat16)
    router = module.chunks[0].decoder.layers[0].mlp.router
    assert (router.weight.dtype, router.expert_bias.dtype) == (torch.bfloat16, torch.bfloat16)
    hidden = torch.randn(5, 1, BIASED.hidden_size, dtype=torch.bfloat16)
    weights, _ = router(hidden)
    assert (weights.dtype, router.gating(hidden).dtype, router.expert_bias.dtype) == (torch.float32,) * 3
