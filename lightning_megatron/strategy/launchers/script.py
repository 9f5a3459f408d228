"""Launches the ranks as copies of the user's script."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_megatron.distributed import crash_report, lightning_private, rank_server
from lightning_megatron.strategy import plain_module
from lightning_megatron.strategy.launchers.crash_file import crash_file

_PATIENCE = 15.0  # seconds in which the others may fail by themselves, and save what they have, before they are ended
_PATIENCE_AFTER_OWN = 3.0  # the same where this process has failed first: the others learn of it only when it has ended
_PATIENCE_WITH_OWN = 5.0  # seconds in which this process may fail by itself once another has ended
_PERIOD = 0.2  # seconds


class ScriptLauncher(lightning_private.SubprocessScriptLauncher):
    """Starts the ranks as Lightning does. They end together, and the last thing that is printed is why.

    When another rank fails, this process notices it in a collective, or is ended. When this process fails, the others
    would notice the broken connection only in a collective; a rank that is in none would run for ever.

    Args:
        strategy: The strategy whose ranks are started.
    """

    def __init__(self, strategy: Any) -> None:
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self._strategy = strategy
        self._error: BaseException | None = None
        self._ends = threading.Lock()
        self._is_ending = self._has_told = False

    @override
    def launch(self, function: Any, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the other ranks, unless they run, and call ``function``."""
        plain_module.check_arguments(args, self._strategy)
        # Before the others start, so that they inherit OMP_NUM_THREADS: ranks share the machine's cores.
        lightning_private.set_num_threads(num_processes=self.num_processes)
        if not self.cluster_environment.creates_processes_externally:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
            os.environ[crash_report.LAUNCHER] = str(os.getpid())
            if rank_server.is_started():
                self._start_from_server()
            else:
                lightning_private.start_scripts(self)
            threading.Thread(target=self._watch, daemon=True).start()
            atexit.register(self._end)
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            self._error = error
            raise

    def _start_from_server(self) -> None:
        """Start the other ranks from the command's server, with the environment that Lightning would give them."""
        environment = self.cluster_environment
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        os.environ["NODE_RANK"] = str(environment.node_rank())
        os.environ["LOCAL_RANK"] = str(environment.local_rank())
        os.environ["WORLD_SIZE"] = str(self.num_processes * self.num_nodes)
        others = range(1, self.num_processes)
        self.procs: Any = [rank_server.RankProcess({**os.environ, "LOCAL_RANK": str(rank)}) for rank in others]

    def _watch(self) -> None:
        """Wait for a rank to fail; end this process if that does not make it fail, too."""
        while not any(process.poll() for process in self.procs):
            if all(process.returncode == 0 for process in self.procs):
                return
            time.sleep(_PERIOD)
        time.sleep(_PATIENCE_WITH_OWN)
        if not self._is_ending:
            self._tell(even_an_exit=True)
            os._exit(1)

    def _end(self) -> None:
        """At the end of this process: if it has failed, end the others, too."""
        error = self._error or getattr(sys, "last_value", None)
        if error is not None:
            self._is_ending = True
            self._has_told = isinstance(error, KeyboardInterrupt)  # the Trainer has told of it, and ended the others
            failed_first = not crash_report.is_consequence(error)
            self._wait(_PATIENCE_AFTER_OWN if failed_first else _PATIENCE)
            self._tell()

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.procs) and time.monotonic() < deadline:
            time.sleep(_PERIOD)

    def _tell(self, even_an_exit: bool = False) -> None:
        """End the other ranks, and print why the run has failed."""
        with self._ends:
            died = {rank: code for rank, process in enumerate(self.procs, 1) if (code := process.poll())}
            for process in self.procs:
                if process.poll() is None:
                    process.kill()
            if self._has_told:
                return
            self._has_told = True
            summary = self._summary(died, even_an_exit)
            if summary:
                sys.stdout.flush()
                print(f"\n{summary}", file=sys.stderr, flush=True)

    def _summary(self, died: dict[int, int], even_an_exit: bool) -> str | None:
        file = crash_file(self._strategy)
        killed = {rank: code for rank, code in died.items() if code < 0 and -code != signal.SIGABRT}
        told = file.read_summary()
        if not killed and (told or not even_an_exit):
            return told
        rank, code = next(iter((killed or died).items()))
        layout = self._strategy.layout
        name = layout.rank_name(self._strategy.node_rank * self.num_processes + rank)
        return crash_report.Failure(name, layout.world_size, crash_report.how_it_ended(code)).summary(file.path)
