"""Completes a layout by the layers of each pipeline stage, which a model's configuration or ``"auto"`` says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_megatron.distributed import pipeline_cut
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.layer_times import layer_times
from lightning_megatron.models.pipeline_balance import Balance
from lightning_megatron.models.recompute import Recompute


def with_stages(
    config: Any, layout: ParallelLayout, recompute: Recompute | None, trains_every_stage: bool
) -> ParallelLayout:
    """The layout with the layers of each stage of a model that has one stack.

    Args:
        config: The model's ``ModelConfig``.
        layout: The parallel sizes.
        recompute: As ``MegatronStrategy(recompute=)`` has it, which makes layers slower.
        trains_every_stage: Whether "auto" leaves no stage without layers.

    Raises:
        LayoutError: Fields of megatron-core's do not fit, or say something else; or there are too few layers.
    """
    if layout.pp == 1:
        return layout
    name = f"{type(config).__name__}(extra={{...}})"
    try:
        said = pipeline_cut.of_core_fields(config.extra, config.num_layers, layout.pp, layout.vp)
    except ValueError as error:
        raise layout.error(f"{name}: {error}") from None
    if said is not None and layout.layers_per_stage not in (None, said):
        raise layout.error(f"{name} cuts the pipeline otherwise, into stages of {list(said)} layers. Leave one out.")
    if layout.layers_per_stage != "auto":
        text = config.extra.get("pipeline_model_parallel_layout")
        mtp = layout.mtp if text is None else pipeline_cut.later_layers(pipeline_cut.as_text(text))
        return replace(layout, layers_per_stage=said or layout.layers_per_stage, mtp=mtp)
    balance = Balance(layer_times(config, recompute)[0], layout.num_stages, int(trains_every_stage))
    if config.num_layers < balance.fewest:
        raise layout.error(
            f"num_layers={config.num_layers} are too few for {layout.num_stages} stages. Use {balance.fewest} or more"
            " layers, or fewer stages."
        )
    return replace(layout, layers_per_stage=balance.cut(layout.pp))
