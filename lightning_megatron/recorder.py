"""``self.log`` inside a micro-batch: recorded, averaged over the micro-batches, then logged once on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_megatron import groups


class LogRecorder:
    """Stands in for ``module.log`` while a schedule runs."""

    def __init__(self) -> None:
        self.share = 1.0
        self._seen: dict[str, tuple[Any, float, dict[str, Any]]] = {}

    @contextmanager
    def listening_to(self, module: pl.LightningModule) -> Iterator[None]:
        """Record instead of logging."""
        module.__dict__["log"] = self._record
        try:
            yield
        finally:
            del module.__dict__["log"]

    def replay(self, module: pl.LightningModule) -> None:
        """Log the averages, the same keys in the same order on every rank, from whichever stage they came."""
        for name, (total, shares, options) in groups.broadcast_object_from_last_stage(self._seen).items():
            module.log(name, total / shares if shares else total, **options)

    def _record(self, name: str, value: Any, **options: Any) -> None:
        if not isinstance(value, (int, float, torch.Tensor)):
            self._seen[name] = (value, 0.0, options)  # a torchmetrics object averages by itself
            return
        value = value.detach() if isinstance(value, torch.Tensor) else float(value)
        total, shares, _ = self._seen.get(name, (0.0, 0.0, options))
        self._seen[name] = (total + value * self.share, shares + self.share, options)
