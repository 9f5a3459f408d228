"""The blocks of two chunks of a row hold every pair of a query and a key that it looks at, once, and few others."""

import pytest
import torch

from lightning_megatron.models.layers.attention_pattern import AttentionPattern
from lightning_megatron.models.layers.visible_blocks import Block, Visible

LENGTH, ROWS = 1200, 2  # longer than a block of queries with a mask
PLACES = torch.arange(LENGTH)
DOCUMENTS = torch.stack([(PLACES >= 90).long() + (PLACES >= 610) + (PLACES >= 611), PLACES // 400])
KEEP = torch.stack([PLACES % 7 > 0, PLACES < 700])
PATTERNS = {
    "causal": AttentionPattern(length=LENGTH),
    "encoder": AttentionPattern(length=LENGTH, causal=False),
    "documents": AttentionPattern(length=LENGTH, documents=DOCUMENTS),
    "documents of an encoder": AttentionPattern(length=LENGTH, documents=DOCUMENTS, causal=False),
    "padded": AttentionPattern(length=LENGTH, keep=KEEP),
    "padded encoder": AttentionPattern(length=LENGTH, keep=KEEP, causal=False),
    "padded documents": AttentionPattern(length=LENGTH, documents=DOCUMENTS, keep=KEEP),
}
CHUNKS = [range(first, first + 600) for first in (0, 600)]


def seen_by(pattern: AttentionPattern, window: int | None) -> torch.Tensor:
    """``[b or 1, s, s]``."""
    query, key = PLACES[:, None], PLACES
    seen = (query >= key) if pattern.causal else torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    if window is not None:
        seen = seen & ((query - key).abs() < window)
    seen = seen.expand(ROWS, -1, -1)
    if pattern.documents is not None:
        seen = seen & (DOCUMENTS[:, :, None] == DOCUMENTS[:, None])
    return seen if pattern.keep is None else seen & KEEP[:, None]


def counted(blocks: list[Block]) -> torch.Tensor:
    """How often each pair of a query and a key is seen, ``[b, s, s]``."""
    total = torch.zeros(ROWS, LENGTH, LENGTH, dtype=torch.int8)
    for queries, keys, causal, seen in blocks:
        block = torch.ones(ROWS, len(queries), len(keys), dtype=torch.int8)
        if causal:
            assert seen is None
            block = block.tril()
        if seen is not None:
            block = block * seen[:, 0]
        total[:, queries.start : queries.stop, keys.start : keys.stop] += block
    return total


def all_blocks(visible: Visible) -> list[Block]:
    return [block for queries in CHUNKS for keys in CHUNKS for block in visible.blocks(queries, keys)]


CASES = [(name, None) for name in PATTERNS]
CASES += [(name, window) for name in PATTERNS for window in (5, 300, 600, 601, 1199)]


@pytest.mark.parametrize(("name", "window"), CASES)
def test_pairs_of_a_pattern(name, window):
    pattern = PATTERNS[name]
    blocks = all_blocks(Visible(pattern, None, window, torch.device("cpu")))
    assert torch.equal(counted(blocks), seen_by(pattern, window).to(torch.int8))
    assert all(block.queries and block.keys for block in blocks)
    assert all(len(block.queries) <= 512 for block in blocks if block.seen is not None)


def test_pairs_of_a_mask():
    of_keys, of_both = ~KEEP[:, None, None], ~seen_by(PATTERNS["padded documents"], None)[:, None]
    for mask in (of_keys, of_both, of_both[:1]):
        blocks = all_blocks(Visible(None, mask, None, torch.device("cpu")))
        assert mask.size(2) == 1 or max(len(block.queries) for block in blocks) == 512
        assert torch.equal(counted(blocks), (~mask).expand(ROWS, 1, LENGTH, LENGTH)[:, 0].to(torch.int8))
    assert all_blocks(Visible(None, None, None, torch.device("cpu"))) == [Block(q, k) for q in CHUNKS for k in CHUNKS]


@pytest.mark.parametrize("window", [5, 300, 1199])
def test_a_mask_of_keys_and_a_window_that_reaches_both_ways(window):
    visible = Visible(None, ~KEEP[:, None, None], window, torch.device("cpu"), causal=False)
    wanted = seen_by(PATTERNS["padded encoder"], window)
    assert torch.equal(counted(all_blocks(visible)), wanted.to(torch.int8))
    reached = visible.reach(CHUNKS[1], range(LENGTH))
    assert wanted[:, CHUNKS[1].start :].sum() == wanted[:, CHUNKS[1].start :, reached.start : reached.stop].sum()
    assert len(reached) == min(LENGTH, 600 + window - 1)


def test_plain_rows_have_no_masks():
    first, second = CHUNKS
    assert all_blocks(Visible(PATTERNS["causal"], None, None, torch.device("cpu"))) == [
        Block(first, first, causal=True),
        Block(second, first),
        Block(second, second, causal=True),
    ]
    wide = Visible(PATTERNS["causal"], None, 1200, torch.device("cpu"))
    assert all(block.seen is None for block in wide.blocks(second, first))
    encoder = Visible(PATTERNS["encoder"], None, None, torch.device("cpu"))
    assert all(block.seen is None for block in all_blocks(encoder))


def test_keys_out_of_reach_are_left_out():
    """A block has the keys from the first that its first query may look at to the last that its last one may."""
    device = torch.device("cpu")
    within = [tuple(block[:2]) for block in all_blocks(Visible(PATTERNS["causal"], None, 100, device))]
    queries = [range(0, 512), range(512, 600), range(600, 1112), range(1112, 1200)]
    assert within == [
        (queries[0], range(0, 512)),
        (queries[1], range(413, 600)),
        (queries[2], range(501, 600)),
        (queries[2], range(600, 1112)),
        (queries[3], range(1013, 1200)),
    ]
    apart = AttentionPattern(length=LENGTH, documents=PLACES[None] // 300, causal=False)
    found = [tuple(block[:2]) for block in all_blocks(Visible(apart, None, None, device))]
    assert found == [(queries[0], CHUNKS[0]), (queries[1], range(300, 600)), (queries[2], CHUNKS[1]),
                     (queries[3], range(900, 1200))]  # fmt: skip
