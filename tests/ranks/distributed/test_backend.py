"""The CPU backend changes megatron-core only, and puts back what it changed."""

import gc
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer as buffers
from megatron.core.pipeline_parallel import p2p_communication

from lightning_megatron.distributed.device import use_device
from tests.support.ranks import run_ranks


def _send_and_forget() -> float:
    use_device(torch.device("cpu"))
    dist.init_process_group("gloo", timeout=timedelta(seconds=10))
    message, received = torch.ones(1000), torch.zeros(1000)
    mine = {"send_next": message} if os.environ["RANK"] == "0" else {"recv_prev": received}
    tensors = {f"tensor_{way}": mine.get(way) for way in ("send_prev", "recv_prev", "send_next", "recv_next")}
    if "recv_prev" in mine:
        time.sleep(1)  # it asks for the message when the sender has long gone on
    handles = p2p_communication._p2p_ops(**tensors, group=dist.group.WORLD, prev_pipeline_rank=0, next_pipeline_rank=1)
    if "recv_prev" in mine:
        handles["recv_prev"].wait()
    del handles
    gc.collect()
    dist.barrier()
    return float(received.sum())


def test_a_message_outlives_its_handle():
    assert run_ranks(2, _send_and_forget, timeout=40) == [0.0, 1000.0]


def _overlap() -> tuple[dict[str, int], dict[str, list[float]]]:
    """Start what megatron-core coalesces, forget what it is about, and wait."""
    use_device(torch.device("cpu"))
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    world, rank = dist.group.WORLD, dist.get_rank()
    operations = {
        "all_gather": lambda whole, part: buffers.dist_all_gather_func(whole, part, group=world, async_op=True),
        "reduce_scatter": lambda whole, part: buffers.dist_reduce_scatter_func(part, whole, group=world, async_op=True),
        "all_reduce": lambda whole, _: buffers.torch.distributed.all_reduce(whole, group=world, async_op=True),
    }
    works, sums = {}, {}
    for name, start in operations.items():
        wholes = [torch.full((2 * size,), float(rank + 1)) for size in (3, 500, 7)]
        with buffers._coalescing_manager(world, async_ops=True) as handle:
            for whole in wholes:
                start(whole, whole.chunk(2)[rank])
        works[name] = len(handle.works)
        gc.collect()
        handle.wait()
        handle.wait()  # megatron-core may
        sums[name] = [float(whole.double().sum()) / len(whole) for whole in wholes]
    return works, sums


def test_overlapped_collectives_run_one_by_one():
    """1 on the first rank and 2 on the second: gathered halves, half of the sums beside what was there, or the sums."""
    first, second = run_ranks(2, _overlap, timeout=40)
    assert first[0] == second[0] == {"all_gather": 3, "reduce_scatter": 3, "all_reduce": 3}
    assert first[1] == {"all_gather": [1.5] * 3, "reduce_scatter": [2.0] * 3, "all_reduce": [3.0] * 3}
    assert second[1] == {"all_gather": [1.5] * 3, "reduce_scatter": [2.5] * 3, "all_reduce": [3.0] * 3}


def _alone() -> tuple[int, list[float]]:
    """The same on one rank: into a buffer itself, and into another."""
    use_device(torch.device("cpu"))
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    world, whole, other = dist.group.WORLD, torch.full((500,), 3.0), torch.zeros(500)
    with buffers._coalescing_manager(world, async_ops=True) as handle:
        buffers.dist_all_gather_func(whole, whole.view(-1), group=world, async_op=True)
        buffers.dist_reduce_scatter_func(whole.view(-1), whole, group=world, async_op=True)
        buffers.torch.distributed.all_reduce(whole, group=world, async_op=True)
        none = len(handle.works)
        buffers.dist_all_gather_func(other, whole, group=world, async_op=True)
    handle.wait()
    return none, [float(whole.mean()), float(other.mean())]


def test_a_rank_that_is_alone_copies_no_buffer_into_itself():
    assert run_ranks(1, _alone, timeout=40) == [(0, [3.0, 3.0])]
