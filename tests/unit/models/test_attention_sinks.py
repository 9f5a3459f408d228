"""Attention with sinks gives what a plain softmax of one more score gives, and its gradients."""

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from lightning_megatron import GPTConfig
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.build_settings import BuildSettings
from lightning_megatron.models.layers.attention import TorchAttention, use_kernel
from lightning_megatron.models.layers.attention_pattern import AttentionPattern, plain_pattern
from lightning_megatron.models.layers.attention_sinks import attend_with_sinks
from lightning_megatron.models.layers.context_parallel import ways
from lightning_megatron.models.layers.visible_blocks import Visible

SETTINGS = BuildSettings(layout=ParallelLayout(world_size=1), device=torch.device("cpu"))
SIZES = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32, "seq_length": 8}


def plain(query, key, value, sinks, window, keep):
    queries, rows, heads, size = query.shape
    keys = key.size(0)
    key, value = (x.repeat_interleave(heads // key.size(2), 2) for x in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * size**-0.5
    q, k = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    unseen = (k > q) | (q - k >= (window or keys)) | ~keep[:, None, None]
    scores = scores.masked_fill(unseen, float("-inf"))
    more = sinks[None, :, None, None].expand(rows, heads, queries, 1)
    return torch.einsum("bhqk,kbhd->qbhd", torch.cat([scores, more], -1).softmax(-1)[..., :-1], value)


@pytest.mark.parametrize(
    ("queries", "keys", "window", "padded"),
    [
        (37, 37, None, 0),
        (37, 37, 5, 0),
        (600, 600, 100, 0),
        (37, 37, None, 9),  # the first queries look at nothing but the sink
        (37, 37, 5, 9),
        (1, 20, None, 0),  # a token that is generated
        (1, 20, 6, 0),
        (3, 20, 6, 4),
    ],
)
def test_sinks_are_one_more_score(queries, keys, window, padded):
    torch.manual_seed(1)
    shapes = ((queries, 2, 6, 8), (keys, 2, 2, 8), (keys, 2, 2, 8), (6,))
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    keep = torch.ones(2, keys, dtype=torch.bool)
    keep[0, :padded] = False
    pattern = plain_pattern(keys, queries)
    if padded:
        pattern = AttentionPattern(length=keys, keep=keep, queries=range(keys - queries, keys))
    visible = Visible(pattern, None, window, torch.device("cpu"))
    seen, wanted = attend_with_sinks(*given, visible, None), plain(*given, window, keep)
    torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-5)
    gradient = torch.randn_like(seen)
    for ours, theirs in zip(
        torch.autograd.grad(seen, given, gradient), torch.autograd.grad(wanted, given, gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_what_sinks_do_not_go_with():
    with pytest.raises(ValueError, match=r"attention_sinks=True\) needs attention_dropout=0.0 \(here 0.1\)"):
        GPTConfig(**SIZES, attention_sinks=True, attention_dropout=0.1)
    sizes = {"cp": 2, "tp": 1, "heads": 6, "groups": 3}
    assert ways.chosen(None, **sizes, sinks=True) == "all_to_all"
    with pytest.raises(ValueError, match=r"cp_comm='ring'\) does not know the sinks.*cp_comm='all_to_all'"):
        ways.chosen("ring", **sizes, sinks=True)
    config = GPTConfig(**SIZES, attention_sinks=True).transformer_config(SETTINGS)
    layer = TorchAttention(config, 1, AttnMaskType.causal, "self")
    with pytest.raises(ValueError, match=r"attention='math'\): this model has sinks.*Leave attention out"):
        use_kernel([layer], "math", torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="5 heads do not divide by it"):
        ways.chosen(None, **{**sizes, "heads": 5}, sinks=True)
