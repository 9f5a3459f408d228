"""The private names of torch and megatron-core that checkpoints need: fails when a release changes them."""

import inspect
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.utils.data import DataLoader

from lightning_megatron.checkpoint import torch_private


def test_the_record_of_a_shards_place():
    place = torch_private.place_in_file("__0_0.distcp", 16, 8)
    assert (place.relative_path, place.offset, place.length) == ("__0_0.distcp", 16, 8)


def test_reading_takes_a_reader_and_a_planner_and_works_without_ranks():
    names = list(inspect.signature(_load_state_dict).parameters)
    assert names[:2] == ["state_dict", "storage_reader"]
    assert {"no_dist", "planner"} <= set(names)


def test_copies_of_a_shard_have_one_id():
    first = ShardedTensor.from_rank_offsets("weight", torch.zeros(2), (0, 0, 2))
    second = ShardedTensor.from_rank_offsets("weight", torch.zeros(2), (0, 1, 2))
    assert torch_private.shard_id(first) == torch_private.shard_id(replace(first, replica_id=1))
    assert torch_private.shard_id(first) != torch_private.shard_id(second)


def test_persistent_workers_are_started_again():
    loader = DataLoader([1, 2], num_workers=1, persistent_workers=True)
    first = iter(loader)
    assert iter(loader) is first
    torch_private.stop_persistent_workers(loader)
    assert iter(loader) is not first
