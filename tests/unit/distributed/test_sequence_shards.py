"""Which places of a row each of the ranks that share it holds, and how rows are divided and joined."""

import pytest
import torch

from lightning_megatron.distributed.sequence_shards import SequenceShards

KINDS = pytest.mark.parametrize("zigzag", [True, False])


def test_causal_shards_have_a_chunk_from_each_end():
    assert [SequenceShards(3, rank).parts(12) for rank in range(3)] == [
        [range(0, 2), range(10, 12)],
        [range(2, 4), range(8, 10)],
        [range(4, 6), range(6, 8)],
    ]
    assert SequenceShards(3, 1, zigzag=False).parts(12) == [range(4, 8)]
    assert SequenceShards(3, 1).parts(12, rank=0) == [range(0, 2), range(10, 12)]
    assert SequenceShards(1, 0).parts(4) == [range(0, 2), range(2, 4)]


@KINDS
def test_a_length_that_does_not_divide_says_which_does(zigzag):
    chunks, longer = (6, 18) if zigzag else (3, 15)
    with pytest.raises(ValueError, match=f"into {chunks} chunks, which cp=3 needs. Pad it to {longer}"):
        SequenceShards(3, 0, zigzag).parts(14)


@KINDS
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_what_is_taken_is_joined_again(dim, zigzag):
    rows = torch.arange(12**3).view(12, 12, 12)
    shards = [SequenceShards(3, rank, zigzag) for rank in range(3)]
    taken = [each.take(rows, dim) for each in shards]
    for each, own in zip(shards, taken, strict=True):
        places = [place for part in each.parts(12) for place in part]
        assert torch.equal(own, rows.index_select(dim, torch.tensor(places)))
        assert own.is_contiguous()
        assert torch.equal(each.join(taken, dim), rows)
    if dim == 0:
        assert all(torch.equal(each.split(rows), torch.stack(taken)) for each in shards)


@KINDS
def test_one_rank_has_whole_rows(zigzag):
    """Nothing is sent, and no process group is needed."""
    alone, rows = SequenceShards(1, 0, zigzag), torch.arange(8).view(2, 4)
    for found in (alone.take(rows, 1), alone.gather(rows, 1), alone.from_first(rows), alone.join([rows], 1)):
        assert torch.equal(found, rows)
