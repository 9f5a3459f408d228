"""Makes ModelSummary show the whole model's parameters, of which a rank holds a shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary import ModelSummary as Summary
from typing_extensions import override

from lightning_megatron.distributed import collectives, lightning_private, process_groups
from lightning_megatron.models.megatron_module import MegatronModule


def callbacks_to_replace(trainer: pl.Trainer) -> list[ModelSummary]:
    """The summary callbacks that would show one rank's parameters as the whole model's."""
    if not isinstance(trainer.lightning_module, MegatronModule):
        return []
    return [callback for callback in trainer.callbacks if isinstance(callback, ModelSummary)]  # type: ignore[attr-defined]


def count_parameters(module: torch.nn.Module, *, trainable_only: bool = False) -> int:
    """Count the parameters that this stage adds to the model: shards ``tp`` times, copies on one stage only."""
    tp = process_groups.tensor_parallel().size()
    return sum(
        p.numel() * (tp if getattr(p, "tensor_model_parallel", False) else 1)
        for p in module.parameters()
        if not getattr(p, "shared", False) and (p.requires_grad or not trainable_only)
    )


def summarize(max_depth: int, _: pl.Trainer, module: pl.LightningModule) -> Summary:
    """Summarise the whole model; it stands in for ModelSummary's own method."""
    return _WholeSummary(module, max_depth=max_depth)


@dataclass
class _Row:
    """One row of a summary: the fields of Lightning's ``LayerSummary`` that are sent between stages."""

    num_parameters: int
    layer_type: str
    training: bool
    total_flops: int = 0
    in_size: Any = "?"
    out_size: Any = "?"


class _WholeSummary(Summary):
    """A summary with the rows of every pipeline stage and the parameters of all tensor-parallel ranks."""

    @override
    def summarize(self) -> dict[str, Any]:
        own = super().summarize()
        rows = {
            name: _Row(count_parameters(lightning_private.layer_of(row)), row.layer_type, row.training)
            for name, row in own.items()
        }
        module = lightning_private.summarized_module(self)
        totals = tuple(count_parameters(module, trainable_only=only) for only in (False, True))
        stages = collectives.gather_from_stages((rows, totals))
        self._totals = [sum(parts) for parts in zip(*(totals for _, totals in stages), strict=True)]
        if len(stages) == 1:
            return rows
        return {f"stage {stage}: {name}": row for stage, (part, _) in enumerate(stages) for name, row in part.items()}

    @property
    @override
    def total_parameters(self) -> int:
        return self._totals[0]

    @property
    @override
    def trainable_parameters(self) -> int:
        return self._totals[1]
