"""Adds to an out-of-memory error what the training takes by its sizes, and what would take less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.model_config import ModelConfig

_GB = 1e9


def explain(error: BaseException, config: object, layout: ParallelLayout, **training: Any) -> None:
    """Add a note to an out-of-memory error; other errors stay as they are.

    Args:
        error: Any error.
        config: The module's configuration, or None where it has none: the note is then without a table.
        layout: The parallel sizes of the run.
        **training: The run's settings, as ``ParallelLayout.memory`` takes them.
    """
    if not is_out_of_memory(error):
        return
    advice = list(_advice(layout, training))
    if not isinstance(config, ModelConfig):
        error.add_note(f"Less memory is taken with {', or '.join(told for told, _, _ in advice)}.")
        return
    try:
        now = layout.memory(config, **training)
        lines = [f"Training takes, by the sizes of {type(config).__name__}:", str(now), "It takes less with"]
        for told, other, changed in advice:
            saved = now.largest.total - other.memory(config, **{**training, **changed}).largest.total
            if saved > 0:
                lines.append(f"- {told}: {saved / _GB:.2f} GB less")
        lines.append("- a larger tp (with sequence_parallel=True), pp or, for long sequences, cp, on more devices.")
        error.add_note("\n".join(lines))
    except Exception as wrong:  # the error itself matters more
        error.add_note(f"What training takes could not be estimated: {wrong}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no memory left: CUDA's error, or the text of the CPU's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _advice(layout: ParallelLayout, training: dict[str, Any]) -> Iterator[tuple[str, ParallelLayout, dict[str, Any]]]:
    """What would help, in the order in which to try it: in words, the layout, and the settings that differ."""
    if training["micro_batch_size"] > 1:
        yield "micro_batch_size=1", layout, {"micro_batch_size": 1}
    kernels = training["kernels"]
    if kernels.chunked_loss is not True:
        yield "kernels=Kernels(chunked_loss=True)", layout, {"kernels": replace(kernels, chunked_loss=True)}
    if training["recompute"] is None:
        yield 'recompute="selective"', layout, {"recompute": "selective"}
    if training["recompute"] != "full":
        yield 'recompute="full"', layout, {"recompute": "full"}
    if not training["distributed_optimizer"] and layout.dp * layout.cp > 1:
        yield "distributed_optimizer=True", layout, {"distributed_optimizer": True}
    if layout.cp > 1 and training["cp_comm"] != "ring":
        yield 'cp_comm="ring"', layout, {"cp_comm": "ring"}
    if layout.tp > 1 and not layout.sequence_parallel:
        yield "sequence_parallel=True", replace(layout, sequence_parallel=True), {}
