"""Attention of ranks that hold parts of rows, in each way, against one process with whole rows: results and gradients.

Both sides compute in fp32 and add up the same numbers in another order: 2e-6 of results, and 1e-5 of gradients, which
are sums over the queries of all ranks.
"""

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from lightning_megatron.distributed import process_groups
from lightning_megatron.distributed.device import use_device
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.layers.attention import TorchAttention
from lightning_megatron.models.layers.attention_pattern import AttentionPattern, PatternParams
from lightning_megatron.models.layers.context_parallel import ways
from lightning_megatron.training.saved_bytes import SavedBytes
from tests.support.ranks import run_in_pool

ROWS, LENGTH, HEADS, SIZE = 3, 320, 8, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What one layer is asked for."""

    groups: int = HEADS
    window: int | None = None
    causal: bool = True
    cross: bool = False
    documents: int | None = None  # the longest
    keep: str | None = None
    mask: str | None = None
    bias: bool = False
    dtype: torch.dtype = torch.float32
    length: int = LENGTH

    def layer(self, cp: int, way: str | None, dropout: float = 0.0) -> TorchAttention:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HEADS * SIZE,
            num_attention_heads=HEADS,
            num_query_groups=self.groups,
            attention_dropout=dropout,
            window_size=None if self.window is None else (self.window - 1, (self.window - 1) * (not self.causal)),
            context_parallel_size=cp,
            cp_comm_type=way if cp > 1 else None,
        )
        kind = AttnMaskType.causal if self.causal and not self.cross else AttnMaskType.padding
        return TorchAttention(config, 1, kind, "cross" if self.cross else "self")

    def tensors(self) -> list[torch.Tensor]:
        """Queries, keys, values and the gradient of the result, of whole rows."""
        numbers = torch.Generator().manual_seed(3)
        keys = self.length // 2 if self.cross else self.length
        shapes = [(self.length, HEADS), (keys, self.groups), (keys, self.groups), (self.length, HEADS)]
        return [torch.randn(s, ROWS, heads, SIZE, generator=numbers).to(self.dtype) for s, heads in shapes]

    def who(self) -> dict[str, Any]:
        """The arguments that say who looks at whom, of whole rows."""
        numbers, keys = torch.Generator().manual_seed(4), self.length // 2 if self.cross else self.length
        found: dict[str, Any] = {}
        documents = keep = None
        if self.documents:
            starts = torch.rand(ROWS, self.length, generator=numbers) < 1 / self.documents
            documents = starts.cumsum(dim=1)
        if self.keep:
            ends = torch.tensor([[self.length // 5], [self.length], [0]])
            places = torch.arange(self.length)
            holes = torch.rand(ROWS, self.length, generator=numbers) < 0.8
            keep = {"behind": places < ends, "in front": places >= ends, "with holes": holes}[self.keep]
        if documents is not None or keep is not None:
            pattern = AttentionPattern(length=self.length, documents=documents, keep=keep, causal=self.causal)
            found["packed_seq_params"] = PatternParams(pattern)
        if self.mask == "of keys":
            found["attention_mask"] = torch.rand(ROWS, 1, 1, keys, generator=numbers) < 0.3
        if self.mask == "of both":
            ahead = torch.ones(self.length, keys, dtype=torch.bool).triu(1) if self.causal and not self.cross else False
            found["attention_mask"] = (torch.rand(ROWS, 1, self.length, keys, generator=numbers) < 0.3) | ahead
        if self.bias:
            found["attention_bias"] = torch.randn(1, HEADS, self.length, keys, generator=numbers)
        return found


CASES = {
    "causal": Case(),
    "a shorter row": Case(length=16),
    "grouped": Case(groups=2),
    "window": Case(window=90, groups=4),
    "narrow window": Case(window=7),
    "documents": Case(documents=60, groups=4),
    "short documents": Case(documents=8),
    "long documents in a window": Case(documents=200, window=90),
    "padded behind": Case(keep="behind", groups=2),
    "padded in front": Case(keep="in front"),
    "holes and documents": Case(keep="with holes", documents=60),
    "dense mask": Case(mask="of both", groups=4),
    "dense mask and window": Case(mask="of both", window=90),
    "encoder": Case(causal=False),
    "padded encoder": Case(causal=False, mask="of keys", groups=4),
    "encoder with documents": Case(causal=False, documents=60),
    "encoder with a kept part": Case(causal=False, keep="with holes"),
    "encoder with a window": Case(causal=False, window=90),
    "encoder with a narrow window": Case(causal=False, window=7, mask="of keys"),
    "encoder with documents in a window": Case(causal=False, window=30, documents=60, keep="with holes"),
    "cross": Case(cross=True),
    "padded cross": Case(cross=True, mask="of keys"),
    "cross with a dense mask": Case(cross=True, mask="of both"),
}
BIASED = {
    "encoder with a bias": Case(causal=False, bias=True, mask="of keys"),
    "decoder with a bias": Case(bias=True, mask="of both"),
    "cross with a bias": Case(cross=True, bias=True),
}


def compare(ranks: int, way: str | None, cases: dict[str, Case]) -> dict[str, list[float]]:
    """On a rank: of each case, by how much the result and the gradients are off at most."""
    _start(ranks)
    return {name: _differences(case, ranks, way) for name, case in cases.items()}


def _start(ranks: int) -> None:
    use_device(torch.device("cpu"))
    process_groups.init_default_group(torch.device("cpu"))
    process_groups.build(ParallelLayout(world_size=ranks, cp=ranks))
    process_groups.seed(5)


def _differences(case: Case, ranks: int, way: str | None) -> list[float]:
    *tensors, gradient = case.tensors()
    given = case.who()
    whole = [tensor.clone().requires_grad_() for tensor in tensors]
    bias = given.pop("attention_bias", None)
    whole_bias = None if bias is None else bias.clone().requires_grad_()
    expected = case.layer(1, None)(*whole, attention_bias=whole_bias, **given).unflatten(2, (HEADS, SIZE))
    expected.backward(gradient)

    layer = case.layer(ranks, way)
    queries, keys = layer.shards_of_queries, layer.shards_of_keys
    assert queries.zigzag == (case.causal or case.cross)
    shards = [queries, keys, keys]
    own = [each.take(tensor, 0).requires_grad_() for tensor, each in zip(tensors, shards, strict=True)]
    own_bias = None if bias is None else queries.take(bias, 2).requires_grad_()
    result = layer(*own, attention_bias=own_bias, **given).unflatten(2, (HEADS, SIZE))
    # The gradient that a layer gets is often no contiguous one.
    result.backward(queries.take(gradient, 0).transpose(0, 1).contiguous().transpose(0, 1))
    pairs = [(result, queries.take(expected, 0))]
    pairs += [(mine.grad, each.take(x.grad, 0)) for mine, x, each in zip(own, whole, shards, strict=True)]
    if whole_bias is not None:
        pairs.append((own_bias.grad, queries.take(whole_bias.grad, 2)))
    return [float((mine - theirs).abs().max()) for mine, theirs in pairs]


WAYS = ["all_gather", "all_to_all", "ring"]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_ranks_that_share_rows_compute_what_one_does(way, ranks):
    cases = CASES if way == "ring" else CASES | BIASED
    for found in run_in_pool(ranks, compare, ranks, way, cases):
        off = {name: each for name, each in found.items() if not (each[0] < 2e-6 and max(each[1:]) < 1e-5)}
        assert not off


@pytest.mark.parametrize("way", WAYS)
def test_in_bf16(way):
    cases = {"causal": Case(dtype=torch.bfloat16), "documents": Case(dtype=torch.bfloat16, documents=60, groups=4)}
    for found in run_in_pool(2, compare, 2, way, cases):
        assert all(max(each) <= 0.0625 for each in found.values()), found  # the last digit of numbers above 8


def draw(ranks: int, way: str) -> list[torch.Tensor]:
    """On a rank: results with dropout after a seed, after it again, and without dropout."""
    _start(ranks)
    case, found = Case(), []
    layer = case.layer(ranks, way, dropout=0.4)
    *tensors, _ = case.tensors()
    tensors = [torch.ones_like(tensor) for tensor in tensors]
    own = [layer.shards_of_queries.take(tensor, 0) for tensor in tensors]
    for _ in range(2):
        process_groups.seed(5)
        found.append(layer(*own))
    return [*found, layer.eval()(*own)]


@pytest.mark.parametrize("way", ["all_gather", "all_to_all"])
def test_dropout_is_drawn_alike_after_the_same_seed_and_otherwise_on_other_ranks(way):
    first, second = run_in_pool(2, draw, 2, way)
    for once, again, without in (first, second):
        assert torch.equal(once, again)
        assert not torch.allclose(once, without)
        torch.testing.assert_close(without, torch.ones_like(without))
    if way == "all_gather":  # the last tokens of each half look at many: other draws for other queries
        assert not torch.allclose(first[0], second[0])
    else:  # of each query other draws for other heads
        halves = first[0].unflatten(2, (HEADS, SIZE)).chunk(2, dim=2)
        assert not torch.allclose(*halves)


def kept(ranks: int, way: str, length: int) -> tuple[int, int]:
    """On a rank: the bytes that the backward pass needs, and those of this rank's queries."""
    _start(ranks)
    case = Case(length=length)
    layer = case.layer(ranks, way)
    *tensors, _ = case.tensors()
    own = [layer.shards_of_queries.take(tensor, 0).requires_grad_() for tensor in tensors]
    with SavedBytes([]) as saved:
        result = layer(*own)
    until_backward = saved.now
    result.sum().backward()
    return until_backward, own[0].nbytes


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_keeps_its_own_part_alone(way):
    """Queries, keys, values, the result, the log-sum-exp of each head, and nothing of the others' parts.

    A head's log-sum-exp is an eighth of its 8 channels. To be gathered again, keys and values are kept side by side.
    """
    for bytes_kept, of_queries in run_in_pool(4, kept, 4, way, 1024):
        assert 4 * of_queries <= bytes_kept <= 4.25 * of_queries


def _chosen(asked: str | None, heads: int, **more: Any) -> str:
    return ways.chosen(asked, **{"cp": 2, "tp": 1, "heads": heads, "groups": heads, **more})


def test_the_best_way_is_chosen_by_heads():
    assert _chosen(None, 4) == "all_to_all"
    assert _chosen(None, 3) == "all_gather"
    assert _chosen(None, 4, groups=1) == "all_gather"
    assert _chosen(None, 4, dropout=0.1, biased=True) == "all_to_all"
    assert _chosen(None, 4, tp=4) == "all_gather"


def test_a_way_that_cannot_says_which_can():
    with pytest.raises(ValueError, match="3 heads do not divide by it. Use cp_comm='all_gather' or 'ring'"):
        _chosen("all_to_all", 3)
    with pytest.raises(
        ValueError, match="'ring'. has no kernel for attention_dropout=0.1. Use .* or attention_dropout=0"
    ):
        _chosen("ring", 4, dropout=0.1)
    with pytest.raises(ValueError, match="'ring'. has no kernel for a relative position bias"):
        _chosen("ring", 4, biased=True)
    with pytest.raises(ValueError, match="cp_comm='p2p': use 'all_gather'"):
        _chosen("p2p", 4)
