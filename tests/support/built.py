"""Modules that are built in this process as a run would build them."""

from typing import Any

import torch

from lightning_megatron.distributed import process_group_backends, process_groups
from lightning_megatron.distributed.device import use_device
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.build_settings import BuildSettings


def built(module: Any, seed: int = 1, **settings: Any) -> Any:
    """The module with its chunk, in training mode, for one rank and further ``BuildSettings``."""
    cpu, layout = torch.device("cpu"), ParallelLayout(world_size=1)
    use_device(cpu)
    process_group_backends.init_for_build(cpu)
    process_groups.build(layout)
    process_groups.seed(seed)
    torch.manual_seed(seed)
    module.connect_data(None)
    module.settings = BuildSettings(layout=module.complete_layout(layout), **settings)
    module.configure_model()
    return module.to(module.settings.params_dtype).train()
