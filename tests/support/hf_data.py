"""A HFDataModule that is set up without a Trainer."""

from types import SimpleNamespace
from typing import Any

import torch

from lightning_megatron.data import HFDataModule


def made(
    stage: str = "fit", replicas: int = 1, rank: int = 0, kind: type[HFDataModule] = HFDataModule, **options: Any
) -> HFDataModule:
    """A module that is ready, as on one of several replicas."""
    module = kind(**{"seq_length": 32, "batch_size": 4, **options})
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        distributed_sampler_kwargs={"num_replicas": replicas, "rank": rank},
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    module.prepare_data()
    module.setup(stage)
    return module
