"""``MemoryTable``: the bytes that a rank of each pipeline stage needs, by kind, as a table for people."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage.

    Args:
        weights: The weights of its part of the model.
        gradients: The gradients of all of them.
        optimizer: Its share of the optimizer's state, and of the main weights where those are copies.
        activations: What the backward pass needs of the layers, for all micro-batches in flight.
        logits: What it needs of the output layer and the loss.
        buffers: What is sent between stages, and the copy of the logits that the loss is computed from.
    """

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    logits: float = 0
    buffers: float = 0

    @property
    def states(self) -> float:
        """The bytes that stay from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """The bytes of all kinds together."""
        return sum(getattr(self, kind.name) for kind in fields(self))


@dataclass(frozen=True)
class MemoryTable:
    """What training takes on a rank of each pipeline stage, without what the device's libraries and fragments take.

    Args:
        stages: The bytes of a rank of each pipeline stage.
    """

    stages: tuple[StageMemory, ...]

    @property
    def largest(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    def __str__(self) -> str:
        kinds = [field.name for field in fields(StageMemory)]
        titles = [f"stage {number}" for number in range(len(self.stages))] if len(self.stages) > 1 else ["each rank"]
        width = max(9, *map(len, titles)) + 1
        unit, size = ("GB", 1e9) if self.largest.total >= 1e9 else ("MB", 1e6)
        lines = [unit.ljust(12) + "".join(title.rjust(width) for title in titles)]
        for kind in [*kinds, "total"]:
            values = (getattr(stage, kind) / size for stage in self.stages)
            lines.append(kind.ljust(12) + "".join(f"{value:.2f}".rjust(width) for value in values))
        return "\n".join(lines)
