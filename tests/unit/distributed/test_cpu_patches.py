"""The patches for machines without CUDA change megatron-core only, and are taken back."""

import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.pipeline_parallel import schedules

from lightning_megatron.distributed import cpu_patches
from lightning_megatron.distributed.device import model_rng, use_device


def test_bend_and_unbend():
    use_device(torch.device("cuda"))  # an earlier test may have left it bent
    before = (schedules.torch, clip_grads.torch, distrib_optimizer.DistributedOptimizer.__init__)
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
    after = (schedules.torch, clip_grads.torch, distrib_optimizer.DistributedOptimizer.__init__)
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
