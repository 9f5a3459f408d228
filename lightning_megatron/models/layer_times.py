"""Estimates how long the layers and the output layer of a model take, from the sizes of their matrix products."""

from __future__ import annotations

from typing import Any

from lightning_megatron.models.flops import head_flops, layer_flops
from lightning_megatron.models.pipeline_balance import LayerTimes
from lightning_megatron.models.recompute import Recompute

_FORWARD_AND_BACKWARD = 3  # the backward pass has two products for each one


def layer_times(config: Any, recompute: Recompute | None) -> list[LayerTimes]:
    """The times of each stack, in floating-point operations of the longest sequence.

    What tensor, context and expert parallelism divide is divided alike everywhere. The embedding multiplies nothing.

    Args:
        config: The model's ``ModelConfig``.
        recompute: As ``MegatronStrategy(recompute=)`` has it; of its kinds only whole layers count.
    """
    stacks = layer_flops(config)
    whole = recompute if isinstance(recompute, int) else max(map(len, stacks)) if recompute == "full" else 0
    return [
        LayerTimes(
            layers=[round(_FORWARD_AND_BACKWARD * flops) for flops in layers],
            last=round(_FORWARD_AND_BACKWARD * head_flops(config)) if layers is stacks[-1] else 0,
            again=[round(flops) for flops in layers],
            recomputed=whole,
        )
        for layers in stacks
    ]
