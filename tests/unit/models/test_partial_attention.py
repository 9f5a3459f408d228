"""Attention to parts of the keys, merged, and the parts' gradients, against plain softmax over all of them.

Both sides compute in fp32 and add up the same numbers in another order: 2e-6, and 2e-5 of gradients.
"""

import math

import pytest
import torch
from torch import Tensor

from lightning_megatron.models.layers.partial_attention import Merged, attend_behind, attend_part, part_gradients

ROWS, HEADS, GROUPS, QUERIES, KEYS, SIZE = 2, 4, 2, 9, 24, 8


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(queries: int = QUERIES) -> list[Tensor]:
    """Queries ``[b, heads, q, head]``, keys and values ``[b, groups, k, head]``, and the gradient of the result."""
    query, gradient = (drawn(ROWS, HEADS, queries, SIZE, seed=seed) * 2 for seed in (1, 4))
    key, value = (drawn(ROWS, GROUPS, KEYS, SIZE, seed=seed) for seed in (2, 3))
    return [query, key, value, gradient]


def plain(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """A query that looks nowhere has zeros."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -1e30)
    return scores.softmax(-1) * seen @ value


def whole(seen: Tensor, scale: float, queries: int = QUERIES) -> list[Tensor]:
    """The result, and the gradients of queries, keys and values."""
    *given, gradient = tensors(queries)
    leaves = [tensor.requires_grad_() for tensor in given]
    result = plain(*leaves, seen, scale)
    result.backward(gradient)
    return [result.detach(), *(leaf.grad for leaf in leaves)]


MASKS = {
    "of each row": drawn(ROWS, 1, QUERIES, KEYS, seed=5) < 0.3,
    "of all rows": drawn(1, 1, QUERIES, KEYS, seed=6) < 0.3,
    "of keys": (drawn(ROWS, 1, 1, KEYS, seed=7) < 0.5),
    "of no key": torch.zeros(ROWS, 1, QUERIES, KEYS, dtype=torch.bool),
    "none": None,
}
MASKS["of each row"][0, 0, 3] = False  # this query looks nowhere, and these do not look at the first part
MASKS["of each row"][1, 0, :5, :10] = False
PARTS = [slice(0, 10), slice(10, 11), slice(11, KEYS)]


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("name", MASKS)
def test_parts_are_merged_into_the_whole(name, scale):
    seen = MASKS[name]
    everything = torch.ones(1, 1, QUERIES, KEYS, dtype=torch.bool) if seen is None else seen
    expected = whole(everything, scale or 1 / math.sqrt(SIZE))
    query, key, value, gradient = tensors()
    merged, queries = Merged(query.permute(2, 0, 1, 3), query.size(-1)), [slice(0, 4), slice(4, QUERIES)]
    calls = []
    for places in queries:
        for part in PARTS:
            here = seen if seen is None or seen.size(2) == 1 else seen[:, :, places]
            calls.append((places, part, None if here is None else here[..., part]))
    for places, part, here in calls:
        out, total = attend_part(query[:, :, places], key[:, :, part], value[:, :, part], here, False, scale)
        assert total.dtype == torch.float32
        merged.add(places, out, total)
    out, total = merged.out.permute(1, 2, 0, 3), merged.finite_total()
    found = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    for places, part, here in calls:
        of_query, of_key, of_value = part_gradients(
            gradient[:, :, places], query[:, :, places], key[:, :, part], value[:, :, part], out[:, :, places],
            total[..., places], here, False, scale,
        )  # fmt: skip
        found[0][:, :, places] += of_query
        found[1][:, :, part] += of_key
        found[2][:, :, part] += of_value
    torch.testing.assert_close(out, expected[0], rtol=0, atol=2e-6)
    for ours, theirs in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_a_query_that_looks_nowhere_has_zeros_and_no_weight():
    query, key, value, _ = tensors()
    out, total = attend_part(query, key, value, MASKS["of each row"], False, None)
    assert not out[0, :, 3].any()
    assert torch.isinf(total[0, :, 3]).all()
    assert torch.isfinite(total[1]).all()
    merged = Merged(query.permute(2, 0, 1, 3), query.size(-1))
    assert not merged.finite_total().any()


def test_causal_parts():
    query, key, value, _ = tensors(KEYS)
    seen = torch.ones(KEYS, KEYS, dtype=torch.bool).tril()
    out, _ = attend_part(query, key, value, None, True, None)
    torch.testing.assert_close(out, plain(query, key, value, seen, 1 / math.sqrt(SIZE)), rtol=0, atol=2e-6)


def test_half_precision_is_merged_in_fp32():
    query = tensors()[0].bfloat16()
    merged = Merged(query.permute(2, 0, 1, 3), query.size(-1))
    assert merged.out.dtype == merged.total.dtype == torch.float32
    key, value = (tensor.bfloat16() for tensor in tensors()[1:3])
    for part in PARTS:
        merged.add(slice(None), *attend_part(query, key[:, :, part], value[:, :, part], None, False, None))
    everything = torch.ones(1, 1, QUERIES, KEYS, dtype=torch.bool)
    expected = plain(query.float(), key.float(), value.float(), everything, 1 / math.sqrt(SIZE))
    torch.testing.assert_close(merged.out.permute(1, 2, 0, 3), expected, rtol=0, atol=0.02)  # two digits of bf16


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("queries", [1, QUERIES])
def test_queries_at_the_end_of_the_keys(queries, scale):
    seen = torch.ones(queries, KEYS, dtype=torch.bool).tril(KEYS - queries)
    expected = whole(seen, scale or 1 / math.sqrt(SIZE), queries)
    *given, gradient = tensors(queries)
    leaves = [tensor.requires_grad_() for tensor in given]
    result = attend_behind(*leaves, scale)
    result.backward(gradient)
    torch.testing.assert_close(result.detach(), expected[0], rtol=0, atol=2e-6)
    for leaf, theirs in zip(leaves, expected[1:], strict=True):
        torch.testing.assert_close(leaf.grad, theirs, rtol=0, atol=2e-5)
