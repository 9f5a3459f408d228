"""Runs one process in a SLURM allocation without ``srun``, which would have told it its rank."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch.plugins.environments import SLURMEnvironment
from typing_extensions import override


class SingleProcessEnvironment(SLURMEnvironment):
    """SLURM's environment for a run of one process, which is rank 0."""

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
    """The strategy's cluster environment; ``SingleProcessEnvironment`` for one process that ``srun`` did not start."""
    environment = strategy.cluster_environment
    alone = strategy.num_processes * strategy.num_nodes == 1
    if type(environment) is not SLURMEnvironment or not alone or "SLURM_PROCID" in os.environ:
        return environment
    return SingleProcessEnvironment(environment.auto_requeue, environment.requeue_signal)
