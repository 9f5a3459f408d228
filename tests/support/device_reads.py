"""Counts how often a step reads a value of a tensor, for which the host waits where the tensor is on a GPU."""

from collections import Counter
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What a program runs where the host needs a value: a number or truth value, or the size of a selection.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique"}


class _Reads(TorchDispatchMode):
    """Counts the operations that the program asks for.

    torch's profiler also counts what the CPU's kernels read inside of one, such as the step count in fused AdamW, which
    no host reads on a GPU; and the number in ``x[mask] = 0``, which is on the host there, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        booleans = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in READS or booleans:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """Counts ``tensor.tolist()``, which runs no operation on the CPU."""

    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.tolist:
            self.found["tolist"] += 1
        return function(*args, **(kwargs or {}))


class DeviceReads(Callback):
    """Keeps the reads of one batch, from behind its move to the device to what hooks see of its end.

    Args:
        batch: The number of the batch.
        lists: Whether ``tolist`` counts, which is how flags of several ranks are read on the host.
    """

    def __init__(self, batch: int, lists: bool = True) -> None:
        self.batch = batch
        reads = _Reads()
        self.found = reads.found
        self._modes = [reads, *([_Lists(reads.found)] if lists else [])]

    def on_train_batch_start(self, run: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            for mode in self._modes:
                mode.__enter__()

    def on_train_batch_end(self, run: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            run.strategy.reduce_boolean_decision(False)  # as after each batch, for whether a signal ends the run
            for mode in reversed(self._modes):
                mode.__exit__(None, None, None)
