"""Estimates the memory of a training from a model's sizes and a layout, before anything is built.

States: per weight as in ZeRO (arXiv 1910.02054, section 3.1), what the distributed optimizer divides by the ranks that
hold the same weights: replicas, and the ranks that share a row.
Activations: those of a micro-batch, which ``activation_memory`` counts, times the micro-batches in flight, whose number
is that of megatron-core's ``theoretical_memory_usage``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.distributed.memory_table import MemoryTable, StageMemory
from lightning_megatron.models.activation_memory import ActivationMemory
from lightning_megatron.models.memory_settings import PRECISIONS, Training
from lightning_megatron.models.parameter_counts import Part, numbered
from lightning_megatron.models.trained_sizes import TrainedSizes


def estimate(
    config: Any, layout: ParallelLayout, training: Training, modules: list[str], scores: tuple[bool, bool]
) -> MemoryTable:
    """The memory of a rank of each pipeline stage.

    Args:
        config: The configuration of a module, such as a ``GPTConfig``.
        layout: The parallel sizes.
        training: Further settings of the run.
        modules: The modules that are recomputed where it is neither "full" nor a number of layers.
        scores: Whether the core attention keeps its scores: self-attention, and cross-attention.
    """
    layers = ActivationMemory(config, layout, training, modules, scores)
    chunks = numbered(config.chunks(layout))
    counts = list(counted(config, layout, layers.trained, chunks))
    stages = []
    for stage in range(layout.pp):
        own = slice(stage, None, layout.pp)
        stages.append(_stage(layout, training, layers, stage, chunks[own], counts[own]))
    return MemoryTable(tuple(stages))


def counted(
    config: Any, layout: ParallelLayout, trained: TrainedSizes, chunks: list[list[Part]]
) -> Iterator[tuple[int, int]]:
    """All weights of each chunk, updates included, and those that are trained."""
    for chunk in chunks:
        updates = sum(trained.updates(part.stack, part.first, part.layers) for part in chunk)
        yield config.parameters(layout, chunk) + updates, trained.numbers(chunk)


def _stage(
    layout: ParallelLayout,
    training: Training,
    layers: ActivationMemory,
    stage: int,
    chunks: list[list[Part]],
    counts: list[tuple[int, int]],
) -> StageMemory:
    numbers, trained = (sum(each) for each in zip(*counts, strict=True))
    weight, gradient, main = PRECISIONS[training.precision]
    routed = sum(layers.trained.of_experts(part) for chunk in chunks for part in chunk)
    copies, of_experts = (layout.dp * layout.cp, layout.expert_dp) if training.distributed_optimizer else (1, 1)
    kept = [sum(layers.kept(part) for part in chunk) for chunk in chunks]  # of each chunk
    flying = chunks_in_flight(layout, stage, training.num_microbatches)
    last = any(part.ends_model for chunk in chunks for part in chunk)
    logits, copy = layers.logits() if last else (0.0, 0.0)
    logits *= 1 + getattr(layers.config, "mtp", 0)
    again = max(0.0, *(layers.recomputed_at_once(chunk[-1], logits) for chunk in chunks))
    return StageMemory(
        weights=numbers * weight,
        gradients=trained * gradient,
        optimizer=((trained - routed) / copies + routed / of_experts) * (main + 4 * training.states),
        activations=flying * sum(kept) / len(kept) + again,
        logits=logits,
        buffers=copy + (2 * layers.hidden() if layout.pp > 1 else 0.0) + layers.from_other_ranks(),
    )


def chunks_in_flight(layout: ParallelLayout, stage: int, num_microbatches: int | None) -> int:
    """The micro-batches, times the chunks of a stage, whose activations it holds at most.

    Of the 1F1B schedule a stage holds one for itself and each stage behind it (arXiv 2104.04473, section 2.2); of the
    interleaved one, as many as ``get_pp_rank_microbatches`` of megatron-core's schedules warms up with, and one.
    """
    virtual = layout.vp or 1
    if layout.pp == 1:
        return 1
    behind = layout.pp - stage - 1
    warm_up = behind if layout.vp is None else 2 * behind + (virtual - 1) * layout.pp
    everything = warm_up + 1 if num_microbatches is None else num_microbatches * virtual
    return min(warm_up + 1, everything)
