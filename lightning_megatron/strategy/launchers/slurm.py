"""One process in a SLURM allocation that ``srun`` has not started: nobody tells it its rank."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch.plugins.environments import SLURMEnvironment
from typing_extensions import override


class OneProcess(SLURMEnvironment):
    """SLURM's job and its signals, with the only process as rank 0."""

    @override
    def world_size(self) -> int:
        return 1

    @override
    def global_rank(self) -> int:
        return 0

    @override
    def local_rank(self) -> int:
        return 0

    @override
    def node_rank(self) -> int:
        return 0


def environment_of(strategy: Any) -> Any:
    """The strategy's cluster environment, or one that knows the rank which SLURM has not told the only process."""
    environment = strategy.cluster_environment
    alone = strategy.num_processes * strategy.num_nodes == 1
    if type(environment) is not SLURMEnvironment or not alone or "SLURM_PROCID" in os.environ:
        return environment
    return OneProcess(environment.auto_requeue, environment.requeue_signal)
