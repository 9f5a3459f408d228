"""The CPU backend changes megatron-core only, and puts back what it changed."""

import gc
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.pipeline_parallel import p2p_communication, schedules

from lightning_megatron.backend import cpu, model_rng, use_device
from tests.ranks import run_ranks


def test_bend_and_unbend():
    before = (schedules.torch, clip_grads.clip_grad_by_total_norm_fp32, distrib_optimizer.DistributedOptimizer.__init__)
    public = (torch.cuda.current_device, torch.zeros, torch.Tensor.type)
    use_device(torch.device("cpu"))
    try:
        assert schedules.torch is not torch
        assert schedules.torch.zeros([], device="cuda").device.type == "cpu"
        assert schedules.torch.Tensor is torch.Tensor
        assert (torch.cuda.current_device, torch.zeros, torch.Tensor.type) == public
        replaced = len(cpu._undo)
        use_device(torch.device("cpu"))
        assert len(cpu._undo) == replaced
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
