"""Tokens reach the experts of their own rank as with megatron-core's dispatcher, without a question to the host."""

from dataclasses import replace

import torch
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_megatron import GPTModule
from lightning_megatron.models.gpt.experts.expert_layer import ExpertLayer
from lightning_megatron.models.gpt.experts.one_rank_dispatch import OneRankDispatcher
from tests.reference.parallel_experts import config_of
from tests.support.built import built


def expert_layer(extra: dict | None = None, **experts) -> ExpertLayer:
    module = built(GPTModule(replace(config_of("ODD", **experts), extra=extra or {})))
    return next(part for part in module.modules() if isinstance(part, ExpertLayer))


def test_outputs_and_gradients_are_megatron_cores():
    layer = expert_layer()
    assert isinstance(layer.token_dispatcher, OneRankDispatcher)
    hidden = torch.randn(7, 3, layer.config.hidden_size, requires_grad=True)
    found = {}
    for name in ("ours", "megatron-core's"):
        output = layer(hidden)[0]
        parameters = [hidden, *layer.parameters()]
        found[name] = [output, *torch.autograd.grad(output.square().sum(), parameters)]
        number = layer.config.num_moe_experts
        layer.token_dispatcher = MoEAlltoAllTokenDispatcher(
            number, list(range(number)), layer.config, get_default_pg_collection()
        )
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_no_size_is_asked_of_the_device():
    layer = expert_layer()
    with FakeTensorMode(allow_non_fake_inputs=True):
        probs, chosen = torch.rand(21, 6), torch.ones(21, 6, dtype=torch.bool)
        copies, weights = layer.preprocess(torch.rand(7, 3, 16, requires_grad=True), probs, chosen)
        copies, _, weights = layer.token_dispatcher.dispatch_postprocess(*layer.dispatch(copies, weights))
        output = layer.postprocess(layer.combine(layer.token_dispatcher.combine_preprocess(copies)), None)
        output.sum().backward()
    assert copies.shape == (21 * layer.config.moe_router_topk, 16)
    assert output.shape == (7, 3, 16)


def test_layers_that_may_drop_tokens_keep_megatron_cores():
    assert isinstance(expert_layer(capacity_factor=1.0).token_dispatcher, MoEAlltoAllTokenDispatcher)
    assert isinstance(expert_layer(eval_capacity_factor=1.0).token_dispatcher, MoEAlltoAllTokenDispatcher)


def test_shared_experts_that_run_beside_the_dispatch_are_run():
    overlapping = expert_layer(extra={"moe_shared_expert_overlap": True})
    assert isinstance(overlapping.token_dispatcher, MoEAlltoAllTokenDispatcher)
    hidden = torch.randn(7, 3, overlapping.config.hidden_size)
    torch.testing.assert_close(overlapping(hidden)[0], expert_layer()(hidden)[0])
