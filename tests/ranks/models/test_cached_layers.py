"""A layer with a cache computes what megatron-core's own layer computes, to the bit."""

from typing import Any

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from lightning_megatron import GPTConfig, GPTModule
from lightning_megatron.models.generation.eval_mode import prepared_to_generate
from lightning_megatron.models.generation.kv_cache import KeyValueCache, Rotation

ROWS, PROMPT = 3, 5
SHAPE: dict[str, Any] = {
    "num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, "seq_length": 16
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rope": {"position_embedding": "rope", "num_query_groups": 2, "bias": False, "activation": "swiglu"},
    "beside": {"position_embedding": "rope", "parallel_residual": True, "rotary_percent": 0.5},
}


def passes(layer: Any, cache: Any, angles: Any, forward: Any) -> list[torch.Tensor]:
    """The outputs for a prompt and two tokens behind it."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for new in (PROMPT, 1, 1):
        hidden = torch.randn(new, ROWS, 32, generator=generator)
        found.append(forward(layer, hidden, attention_mask=None, inference_context=cache, rotary_pos_emb=angles)[0])
        cache.increment_sequence_len_offset(new)
    return found


def beside(layer: Any, hidden: torch.Tensor, **given: Any) -> tuple[torch.Tensor]:
    """A layer whose feed-forward layer reads what attention reads, as megatron-core adds."""
    attended, bias = layer.self_attention(layer.input_layernorm(hidden), **given)
    output, output_bias = MLP.forward(layer.mlp, layer.pre_mlp_layernorm(hidden))
    return (hidden + (attended + bias) + (output + output_bias),)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_with_a_cache_is_megatron_cores(kind: str) -> None:
    module = GPTModule(GPTConfig(**SHAPE, **KINDS[kind])).build()
    model = module.chunks[0]
    for vector in (parameter for parameter in model.parameters() if parameter.dim() == 1):
        torch.nn.init.normal_(vector)  # biases begin with zeros, which would not be missed
    layer = model.decoder.layers[0]
    with prepared_to_generate([model]):
        angles = None if kind == "learned" else model.rotary_pos_emb(16)
        whole = beside if kind == "beside" else TransformerLayer.forward
        for part, megatron in ((layer.self_attention, SelfAttention.forward), (layer, whole)):
            ours = passes(part, KeyValueCache(ROWS, 1, 16), angles, type(part).__call__)
            cache = StaticInferenceContext(ROWS, 16)
            if part is layer:  # its attention reads the cache in this way
                cache = KeyValueCache(ROWS, 1, 16)
            theirs = passes(part, cache, angles, megatron)
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        for linear, megatron in (
            (layer.self_attention.linear_qkv, ColumnParallelLinear),
            (layer.mlp.linear_fc1, ColumnParallelLinear),
            (layer.mlp.linear_fc2, RowParallelLinear),
        ):
            x = torch.randn(1, ROWS, linear.weight.size(1))
            for one, other in zip(linear(x), megatron.forward(linear, x), strict=True):
                assert one is other is None or torch.equal(one, other)
        x = torch.randn(1, ROWS, 32)
        assert torch.equal(layer.mlp(x)[0], MLP.forward(layer.mlp, x)[0])


@pytest.mark.parametrize("channels", [8, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_megatron_cores(interleaved: bool, channels: int) -> None:
    config = GPTModule(GPTConfig(**SHAPE)).build().chunks[0].config
    config.rotary_interleaved = interleaved
    angles = torch.randn(1, 1, 1, channels // 2).repeat_interleave(2, dim=-1) if interleaved else (
        torch.randn(1, 1, 1, channels // 2).repeat(1, 1, 1, 2)
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, ROWS, 4, 8, dtype=dtype)
        rotated = Rotation(angles, dtype, interleaved)(x)
        assert torch.equal(rotated, apply_rotary_pos_emb(x, angles, config=config))


@pytest.mark.parametrize(
    "own", [{}, {"window_rotary_base": 5.0}, {"attention_score_cap": 0.3, "logits_cap": 0.5}], ids=str
)
def test_texts_that_are_written_have_the_logits_of_whole_ones(own: dict[str, Any]) -> None:
    """Of layers with and without a window, whose rotary positions may differ, and with caps."""
    shape = {**SHAPE, "num_layers": 2, "init_method_std": 0.5, **KINDS["rope"], **own}
    model = GPTModule(GPTConfig(**shape, sliding_window=3, sliding_window_layers=[0])).build().chunks[0]
    ids, cache = torch.randint(64, (ROWS, 9)), KeyValueCache(ROWS, 1, 16)
    found = []
    with prepared_to_generate([model]), torch.no_grad():
        for part in (range(5), range(5, 6), range(6, 7), range(7, 9)):
            places = torch.tensor(part).expand(ROWS, -1)
            mask = torch.arange(part.stop) > places[0, :, None] if len(part) > 1 else None
            mask = None if mask is None or part.start == 0 else mask[None, None]
            arguments = {"position_ids": places, "attention_mask": mask, "inference_context": cache}
            found.append(model(ids[:, part.start : part.stop], runtime_gather_output=True, **arguments))
            cache.advance(len(part))
        whole = model(ids, position_ids=None, attention_mask=None)
    torch.testing.assert_close(
        torch.cat(found, dim=1), whole[:, [4, 5, 6, 8]], rtol=1e-4, atol=1e-4
    )  # each part's last
