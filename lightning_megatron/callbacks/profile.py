"""``Profile``: some steps under torch's profiler or Nsight, with the schedule's parts named."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.profiler import ProfilerActivity, record_function
from typing_extensions import override

from lightning_megatron.distributed import lightning_private
from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments


@answer_wrong_names
class Profile(pl.Callback):
    """Profiles optimizer steps ``first`` to ``last`` on every rank.

    With "torch", each rank writes ``rank-R.json``, a trace with operators (and kernels, on a GPU) that
    https://ui.perfetto.dev opens. With "nsight", the steps are marked for ``nsys profile -c cudaProfilerApi``. Either
    names megatron-core's parts: passes of micro-batches (``forward-compute``, ``backward-compute``), exchanges between
    stages, gradient reduction, the optimizer. ``Trainer(profiler=)`` is Lightning's, and works beside it.

    Args:
        first: First optimizer step to profile, counted from 1; leave some steps before it to warm up.
        last: Last optimizer step to profile. None: ``first``.
        tool: "torch" or "nsight".
        directory: Directory of the traces. None: ``profile`` in the Trainer's ``default_root_dir``.
    """

    watches_megatron = True  # so that a plain module on one rank is trained by Megatron's steps, too

    def __init__(
        self,
        first: int = 10,
        last: int | None = None,
        tool: Literal["torch", "nsight"] = "torch",
        directory: str | Path | None = None,
    ) -> None:
        Arguments("Profile", MisconfigurationException).whole(None, first=first, last=first if last is None else last)
        self.first, self.last = first, first if last is None else last
        if not 1 <= self.first <= self.last:
            raise MisconfigurationException(f"Profile(first={first}, last={last}): steps are numbered from 1.")
        if tool not in ("torch", "nsight"):
            raise MisconfigurationException(f"Profile(tool={tool!r}): use 'torch' or 'nsight'.")
        if tool == "nsight" and not torch.cuda.is_available():
            raise MisconfigurationException("Profile(tool='nsight') needs a GPU, and there is none. Use tool='torch'.")
        self.tool = tool
        self.directory = directory
        self._profiler: torch.profiler.profile | None = None
        self._ranges: _Ranges | None = None

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._ranges is not None or trainer.global_step + 1 != self.first:
            return
        strategy: Any = trainer.strategy
        self._ranges = _Ranges(self.tool)
        strategy.listen(self._ranges)
        if self.tool == "nsight":
            torch.cuda.profiler.start()
            return
        cuda = [ProfilerActivity.CUDA] if strategy.root_device.type == "cuda" else []
        self._profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU, *cuda], acc_events=True)
        self._profiler.start()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._ranges is None or not lightning_private.ends_accumulation(trainer) or trainer.global_step < self.last:
            return
        self._stop(trainer)
        folder = Path(self.directory or Path(trainer.default_root_dir) / "profile")
        if self._profiler is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(folder / f"rank-{trainer.global_rank}.json"))
            self._profiler = None
            rank_zero_info(f"Profile: steps {self.first} to {self.last} in {folder}, a file for each rank.")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._ranges is not None:
            self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        trainer.strategy.stop_listening(self._ranges)  # type: ignore[attr-defined]
        self._ranges = None
        if self._profiler is not None:
            self._profiler.stop()
        else:
            torch.cuda.profiler.stop()


class _Ranges:
    """A listener that passes timed events to the profiler, as named ranges."""

    def __init__(self, tool: str) -> None:
        self._nvtx = tool == "nsight"
        self._open: list[tuple[str, Any]] = []

    def begin(self, name: str) -> None:
        """Open a range of this name in the profile."""
        if self._nvtx:
            torch.cuda.nvtx.range_push(name)
            return
        opened = record_function(name)
        opened.__enter__()
        self._open.append((name, opened))

    def end(self, name: str) -> None:
        """Close it, unless it was open before anyone listened."""
        if self._nvtx:
            torch.cuda.nvtx.range_pop()
        elif self._open and self._open[-1][0] == name:
            self._open.pop()[1].__exit__(None, None, None)
