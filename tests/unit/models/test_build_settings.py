"""What differs between the settings of two runs is told by itself."""

import torch

from lightning_megatron import Kernels, ParallelLayout
from lightning_megatron.models.build_settings import BuildSettings, differences


def test_only_what_differs_is_told():
    before = BuildSettings(layout=ParallelLayout(world_size=2, tp=2), kernels=Kernels(fused_layers=True))
    now = BuildSettings(
        layout=ParallelLayout(world_size=2, pp=2), kernels=Kernels(), recompute="full", device=torch.device("meta")
    )
    assert differences(before, now) == (
        "tp=2, pp=1, recompute=None, fused_layers=True",
        "tp=1, pp=2, recompute='full', fused_layers=None",
    )
