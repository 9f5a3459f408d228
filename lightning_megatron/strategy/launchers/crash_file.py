"""Names the file to which the ranks of a run write how they failed."""

from __future__ import annotations

import contextlib
from typing import Any

from lightning_megatron.distributed.crash_report import CrashFile


def crash_file(strategy: Any, key: object = None) -> CrashFile:
    """The file of a run, in the Trainer's ``default_root_dir``; the same for all ranks of a machine.

    Args:
        strategy: The strategy.
        key: What tells the run from others, where it is not the process that has started the ranks.
    """
    folder = "."
    with contextlib.suppress(AttributeError, RuntimeError):  # it has no module yet, or the module no Trainer
        folder = strategy.lightning_module.trainer.default_root_dir
    return CrashFile(folder, strategy.made_at, key)
