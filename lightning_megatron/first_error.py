"""When one rank raises, its peers fail on broken connections: tell them, and the user, what came first."""

from __future__ import annotations

import torch.distributed as dist

_KEY = "lightning_megatron/first_error"
_CONSEQUENCE = "This is a consequence. First, "


def note(error: BaseException) -> None:
    """Record ``error`` as the run's first, or add to it a note of the one that was first on another rank."""
    if not dist.is_initialized():
        return
    mine = f"rank {dist.get_rank()} raised {type(error).__name__}: {error}"
    try:
        store = dist.distributed_c10d._get_default_store()  # private (torch 2.13), the only way to the store
        first = store.compare_set(_KEY, "", mine).decode()
    except Exception:  # the store dies with rank 0: then there is nobody to ask, and nothing to add
        return
    if first != mine:
        error.add_note(_CONSEQUENCE + first)


def is_consequence(error: BaseException) -> bool:
    """Whether ``note`` has found that another rank's error came before this one."""
    return any(text.startswith(_CONSEQUENCE) for text in getattr(error, "__notes__", ()))
