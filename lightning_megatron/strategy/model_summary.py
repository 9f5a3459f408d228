"""Makes ModelSummary show the whole model's parameters, of which a rank holds a shard, and no FLOPs that it lacks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.utilities.model_summary import ModelSummary as Summary
from lightning.pytorch.utilities.model_summary import get_formatted_model_size, get_human_readable_count
from typing_extensions import override

from lightning_megatron.distributed import collectives, lightning_private, process_groups
from lightning_megatron.models.megatron_module import MegatronModule
from lightning_megatron.training.counted_once import is_divided_expert

Columns = list[tuple[str, list[str]]]  # of a summary: the name, and a cell for each row


def callbacks_to_replace(trainer: pl.Trainer) -> list[ModelSummary]:
    """The summary callbacks that would show one rank's parameters as the whole model's."""
    if not isinstance(trainer.lightning_module, MegatronModule):
        return []
    return [callback for callback in trainer.callbacks if isinstance(callback, ModelSummary)]  # type: ignore[attr-defined]


def count_parameters(module: torch.nn.Module, *, trainable_only: bool = False) -> int:
    """Count the parameters that this stage adds to the model: each shard for all of them, copies on one stage only."""
    tp = process_groups.tensor_parallel().size()
    of_experts = process_groups.expert_model_parallel().size() // process_groups.pipeline().size()

    def times(p: torch.nn.Parameter) -> int:
        if is_divided_expert(p):
            return of_experts
        return tp if getattr(p, "tensor_model_parallel", False) else 1

    return sum(
        p.numel() * times(p)
        for p in module.parameters()
        if not getattr(p, "shared", False) and (p.requires_grad or not trainable_only)
    )


def summarize(max_depth: int, _: pl.Trainer, module: pl.LightningModule) -> Summary:
    """Summarise the whole model; it stands in for ModelSummary's own method."""
    return _WholeSummary(module, max_depth=max_depth)


def printer(callback: ModelSummary) -> Callable[..., None] | None:
    """What stands in for the method by which a callback prints its table; None where the method is the user's own."""
    own = type(callback).summarize
    if own is RichModelSummary.summarize:
        return partial(_print_summary, _print_by_rich, own)
    return partial(_print_summary, _print_as_text, own) if own is ModelSummary.summarize else None


def _print_summary(
    show: Callable[..., None],
    usual: Callable[..., None],
    columns: Columns,
    *totals: Any,
    total_flops: int,
    **style: Any,
) -> None:
    """Print a summary, without the FLOPs if they are 0: they are counted with an ``example_input_array`` only."""
    if total_flops:
        usual(columns, *totals, total_flops=total_flops, **style)
    else:
        show([column for column in columns if column[0] != "FLOPs"], *totals, **style)


def _print_as_text(columns: Columns, total: int, trainable: int, size: float, modes: dict[str, int], **_: Any) -> None:
    table = lightning_private.text_of_summary(total, trainable, size, modes, 0, columns)
    logging.getLogger(ModelSummary.__module__).info("\n" + table[: table.rindex("\n")])


def _print_by_rich(
    columns: Columns,
    total: int,
    trainable: int,
    size: float,
    modes: dict[str, int],
    header_style: str = "bold magenta",
    **_: Any,
) -> None:
    from rich import get_console
    from rich.table import Table

    table = Table(header_style=header_style)
    for name, _cells in columns:
        table.add_column(name, justify="right" if name.startswith("Params") else "left", no_wrap=name == "Name")
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    console = get_console()
    console.print(table)
    counts = {"Trainable params": trainable, "Non-trainable params": total - trainable, "Total params": total}
    values = {name: get_human_readable_count(count) for name, count in counts.items()}
    values["Total estimated model params size (MB)"] = get_formatted_model_size(size)
    values |= {f"Modules in {mode} mode": str(count) for mode, count in modes.items()}
    for name, value in values.items():
        console.print(f"[bold]{name}[/]: {value}", highlight=False)


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
