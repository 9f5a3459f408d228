"""The CPU backend changes megatron-core only, and puts back what it changed."""

import gc
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer as buffers
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.pipeline_parallel import p2p_communication, schedules

from lightning_megatron.distributed import cpu_patches
from lightning_megatron.distributed.device import model_rng, use_device
from tests.support.ranks import run_ranks


def test_bend_and_unbend():
    use_device(torch.device("cuda"))  # an earlier test may have left it bent
    before = (schedules.torch, clip_grads.clip_grad_by_total_norm_fp32, distrib_optimizer.DistributedOptimizer.__init__)
    public = (torch.cuda.current_device, torch.zeros, torch.Tensor.type)
    use_device(torch.device("cpu"))
    try:
        assert schedules.torch is not torch
        assert schedules.torch.zeros([], device="cuda").device.type == "cpu"
        assert schedules.torch.Tensor is torch.Tensor
        assert (torch.cuda.current_device, torch.zeros, torch.Tensor.type) == public
        replaced = len(cpu_patches._undo)
        use_device(torch.device("cpu"))
        assert len(cpu_patches._undo) == replaced
    finally:
        use_device(torch.device("cuda"))
    after = (schedules.torch, clip_grads.clip_grad_by_total_norm_fp32, distrib_optimizer.DistributedOptimizer.__init__)
    assert after == before
    assert schedules.torch is torch


def test_the_models_random_numbers_leave_the_datas_alone():
    use_device(torch.device("cpu"))
    try:
        torch.manual_seed(1)
        data = torch.get_rng_state()
        with model_rng():
            first = torch.rand(3)
        assert torch.equal(torch.get_rng_state(), data)
        with model_rng():
            assert not torch.equal(torch.rand(3), first)
    finally:
        use_device(torch.device("cuda"))


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
