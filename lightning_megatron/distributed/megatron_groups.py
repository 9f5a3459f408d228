"""Has megatron-core create its process groups of a layout, names those of this rank, and has it forget them.

The only file that writes to ``megatron.core.parallel_state``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from lightning_megatron.distributed.layout import ParallelLayout


def create(layout: ParallelLayout, timeout: timedelta) -> None:
    """Create the groups of a layout, in which a collective may take as long as ``timeout``; every rank calls it."""
    with _sharing_single_rank_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            virtual_pipeline_model_parallel_size=layout.vp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            distributed_timeout_minutes=timeout.total_seconds() / 60,
            create_gloo_process_groups=dist.get_backend() != "gloo",  # under Gloo every group is one already
        )


def of_this_rank() -> list[dist.ProcessGroup]:
    """Every group that megatron-core has made on this rank; private in megatron-core (0.16.1)."""
    groups = parallel_state._global_process_group_list
    return list(dict.fromkeys(group for group in groups if group is not None))


def forget() -> None:
    """Remove every group from megatron-core's globals; its own function leaves one behind (0.16.1)."""
    parallel_state.destroy_model_parallel()
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)


@contextmanager
def _sharing_single_rank_groups() -> Iterator[None]:
    """Have megatron-core create one group for all purposes that this rank serves alone.

    Each group costs threads, sockets and a meeting of all ranks.
    """
    create, rank = parallel_state.create_group, dist.get_rank()
    single: list[dist.ProcessGroup] = []

    def create_or_share(ranks: list[int], **options: Any) -> Any:
        if len(ranks) > 1 or options.get("pg_options") is not None:
            return create(ranks, **options)
        if ranks[0] != rank:
            return dist.GroupMember.NON_GROUP_MEMBER
        if not single:
            single.append(create(ranks, **{**options, "use_local_synchronization": True, "group_desc": "SINGLE_RANK"}))
        return single[0]

    parallel_state.create_group = create_or_share
    try:
        yield
    finally:
        parallel_state.create_group = create
