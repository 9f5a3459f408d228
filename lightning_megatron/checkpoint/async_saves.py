"""Saves that run beside training: copies in host memory, the background thread, the queue of saves and removals."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_megatron.checkpoint import manifest
from lightning_megatron.checkpoint.manifest import CheckpointError
from lightning_megatron.checkpoint.model_checkpoint import CallbackRecords
from lightning_megatron.checkpoint.writing import RankShards


class HostCopies:
    """Copies of tensors in host memory. The memory is kept between saves, since fresh memory is slow to write."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        self._part = RankShards([])

    def match(self, items: list[tuple[Any, torch.Tensor]]) -> bool:
        """Whether the tensors are equal to those that were copied last."""
        copied = self._part.items
        return (
            bool(copied)
            and [index for index, _ in copied] == [index for index, _ in items]
            and all(torch.equal(copy, tensor.cpu()) for (_, copy), (_, tensor) in zip(copied, items, strict=True))
        )

    @property
    def part(self) -> RankShards:
        """The shards that were copied last."""
        return self._part

    def update(self, items: list[tuple[Any, torch.Tensor]]) -> None:
        """Copy the tensors; from then on training may change them."""
        if [_kind(t) for t in self._kept] != [_kind(t) for _, t in items]:
            on_gpu = any(tensor.is_cuda for _, tensor in items)
            self._kept = []  # frees the old copies before new memory is allocated
            self._kept = [torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=on_gpu) for _, t in items]
        for kept, (_, tensor) in zip(self._kept, items, strict=True):
            kept.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._part = RankShards([(index, kept) for (index, _), kept in zip(items, self._kept, strict=True)])


class BackgroundThread:
    """Runs jobs one after the other in a thread; ``wait`` raises their error."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job was started that ``wait`` has not been called for."""
        return self._thread is not None

    def start(self, job: Callable[[], None]) -> None:
        """Run ``job`` after the jobs started before it, if they succeed."""
        before = self._thread

        def run() -> None:
            if before is not None:
                before.join()
            if self._error is not None:
                return
            try:
                job()
            except BaseException as error:
                self._error = error

        # A daemon thread does not keep the process alive when a run is torn down without a wait.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the jobs, and raise the error of the one that failed."""
        if self._thread is None:
            return
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype


@dataclass
class _Step:
    """One entry of the queue.

    Args:
        what: "save", or "remove" an older checkpoint once the saves before it are complete.
        path: The checkpoint's path.
        done: Whether the checkpoint is saved.
    """

    what: Literal["save", "remove"]
    path: Path
    done: bool = False


class SaveQueue:
    """The saves and removals of one strategy, in order; they are the same on every rank.

    Args:
        on_save_error: "raise" a failed save's error, or "warn" and go on training.
    """

    def __init__(self, on_save_error: Literal["raise", "warn"]) -> None:
        self.on_save_error = on_save_error
        self.callbacks = CallbackRecords()
        self._last_save_failed = False
        self._background = BackgroundThread()
        self._saved: list[Path] = []
        self._pending: list[_Step] = []  # since the last wait

    @property
    def is_busy(self) -> bool:
        """Whether something was started in the background that nobody has waited for."""
        return self._background.busy

    def save(self, path: Path, write: Callable[[], None], background: bool) -> None:
        """Run ``write``, which saves a checkpoint to ``path``, now or in the background."""
        step = _Step("save", path)

        def run() -> None:
            write()
            step.done = True
            self._saved.append(path)

        if background:
            self._pending.append(step)
            self._background.start(run)
        else:
            run()
        self._last_save_failed = False

    def is_being_saved(self, path: Path) -> bool:
        """Whether a save to ``path`` is running: the name is in use, although no file has it yet."""
        return any(step.what == "save" and step.path == path for step in self._pending)

    def wait(self) -> bool:
        """Wait for the saves in the background.

        Returns:
            Whether all of them succeeded; False only with ``on_save_error="warn"``.

        Raises:
            CheckpointError: A save failed; on every rank.
        """
        if not self._background.busy:
            return True
        pending, self._pending = self._pending, []
        try:
            self._background.wait()
        except CheckpointError as error:
            self._handle(error, list(dropwhile(lambda step: step.done or step.what == "remove", pending)))
            return False
        return True

    def wait_after_error(self) -> None:
        """Wait for the saves in the background while another error is raised; warn if a save failed."""
        try:
            self.wait()
        except Exception as error:
            rank_zero_warn(str(error))

    def handle_failure(self, error: CheckpointError, path: Path) -> None:
        """Raise the error of a save to ``path``, or warn, as ``on_save_error`` says."""
        self._handle(error, [_Step("save", path)])

    def remove(self, path: Path) -> None:
        """Delete a checkpoint once the save before has succeeded; every rank calls this, and rank 0 does it."""
        if self._last_save_failed:
            self._keep([path])
            return
        if self._background.busy:
            self._pending.append(_Step("remove", path))
        if _is_first_rank():
            self._after_pending_saves(lambda: manifest.remove(path), f"{path} could not be removed")

    def link(self, path: Path, target: Path) -> None:
        """Make ``path`` a link to ``target`` once that is complete; every rank calls this, and rank 0 does it."""
        if _is_first_rank() and path != target and not self._last_save_failed:
            self._after_pending_saves(
                lambda: manifest.make_link(path, target), f"{path} could not be linked to {target}"
            )

    def _after_pending_saves(self, action: Callable[[], None], warning: str) -> None:
        """Run ``action`` now, or after the pending saves if they succeed; its failure is a warning."""

        def attempt() -> None:
            try:
                action()
            except OSError as error:
                rank_zero_warn(f"{warning}: {error}")

        if self._background.busy:
            self._background.start(attempt)
        else:
            attempt()

    def _handle(self, error: CheckpointError, undone: list[_Step]) -> None:
        self._last_save_failed = True
        if self.on_save_error == "raise":
            raise error
        rank_zero_warn(f"{str(error).rstrip(chr(46))}. Training goes on without this checkpoint.")
        self.callbacks.correct([step.path for step in undone if step.what == "save"], [], self._saved)
        self._keep([step.path for step in undone if step.what == "remove"])

    def _keep(self, paths: list[Path]) -> None:
        """Keep checkpoints that were to be removed in favour of one that was not saved."""
        kept = [path for path in paths if path.exists()]
        for path in kept:
            rank_zero_warn(f"{path} is kept: the save after it failed.")
        self.callbacks.correct([], kept, self._saved)


def _is_first_rank() -> bool:
    """Whether this is rank 0, or outside of a run, where somebody calls a ModelCheckpoint by hand."""
    return not dist.is_initialized() or dist.get_rank() == 0
