"""Launches the ranks as copies of the user's script."""

from __future__ import annotations

import atexit
import subprocess
import sys
import time
from typing import Any

from typing_extensions import override

from lightning_megatron.distributed import lightning_private
from lightning_megatron.strategy import plain_module

_PATIENCE = 15.0  # seconds in which the other ranks may fail by themselves, and say why, before they are killed


class ScriptLauncher(lightning_private.SubprocessScriptLauncher):
    """Lightning's launcher, which also ends the other ranks when this process fails.

    When another rank fails, Lightning ends this process. When this process fails, the others notice the broken
    connection only in a collective; a rank that is in none would run for ever.

    Args:
        strategy: The strategy whose ranks are started.
    """

    def __init__(self, strategy: Any) -> None:
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self._strategy = strategy

    @override
    def launch(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        plain_module.check_arguments(args, self._strategy.layout)
        try:
            return super().launch(function, *args, **kwargs)
        except BaseException:
            atexit.register(_end, self.procs)
            raise


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    for rank, process in enumerate(processes, 1):
        if process.poll() is None:
            process.kill()
            print(f"Local rank {rank} (process {process.pid}) did not end by itself, and was ended.", file=sys.stderr)
