"""A server that imports the package while the command imports it, and from which the command's other ranks start.

Each rank of a command would import for seconds, after the first has done so. A process of the server has everything.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from typing import Any

PRELOADED = ["lightning_megatron.callbacks", "lightning_megatron.data", "lightning_megatron.models"]
OFF = "LIGHTNING_MEGATRON_RANK_SERVER"  # an environment variable; with "0" there is no server

_command: Callable[[], None] | None = None


def start(command: Callable[[], None], *more: str) -> None:
    """Start the server, which imports while this process goes on.

    Args:
        command: What each rank runs; a function that is imported by name, and that reads ``sys.argv``.
        *more: Further modules that the server imports.
    """
    global _command
    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOADED, *more])
    here = signal.signal(signal.SIGINT, signal.SIG_IGN)  # or Ctrl-C during its imports prints where they were
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, here)
    _command = command


def take_interrupts() -> None:
    """Let Ctrl-C end this process of the server, which itself ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def is_started() -> bool:
    """Whether this process has started the server."""
    return _command is not None


class RankProcess:
    """A rank that runs the command again, in a process of the server; it is used as a ``subprocess.Popen`` is.

    Args:
        environment: The environment variables of the process, which has no others.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        given = (_command, list(sys.argv), dict(environment), os.getcwd())
        self._process: Any = context.Process(target=_run, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return int(self._process.pid)

    @property
    def returncode(self) -> int | None:
        """The exit code when the process was last looked at, as in ``Popen``; None while it runs."""
        return self.poll()

    def poll(self) -> int | None:
        """The exit code, negative after a signal; None while the process runs."""
        code: int | None = self._process.exitcode
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process."""
        self.send_signal(signal.SIGKILL)


def _run(command: Callable[[], None], arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Run the command as a new process would."""
    take_interrupts()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = arguments
    if threads := environment.get("OMP_NUM_THREADS", ""):
        import torch  # which has read it when the server imported it

        torch.set_num_threads(int(threads))
    atexit._clear()  # what the server's imports have registered is the server's (private in CPython 3.11 to 3.14)
    try:
        command()
    except Exception as error:  # as at the end of a script, where multiprocessing would only print it
        sys.last_value = error
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
