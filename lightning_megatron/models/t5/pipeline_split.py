"""Splits the layers of a T5 over pipeline stages, with even shares on the encoder's and the decoder's side."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_megatron.distributed.layout import LayoutError, ParallelLayout


@dataclass(frozen=True, kw_only=True)
class T5Stage:
    """What one pipeline stage holds of a T5.

    Args:
        encoder: Whether it has layers of the encoder.
        decoder: Whether it has layers of the decoder; both where there are no pipeline stages.
        ends_stack: Whether its layers are the last of their stack.
        copy: Number of the stage within its stack, from 0; None without pipeline stages.
    """

    encoder: bool
    decoder: bool
    ends_stack: bool
    copy: int | None = None


def with_split(layout: ParallelLayout, encoder: int, decoder: int, costs: tuple[int, int]) -> ParallelLayout:
    """The layout with the split that was asked for, or the one whose slowest stage is the fastest.

    Args:
        layout: The layout, with or without a ``pipeline_split_rank``.
        encoder: Layers of the encoder.
        decoder: Layers of the decoder.
        costs: Time of a layer of the encoder and of one of the decoder, in any unit.

    Raises:
        LayoutError: More stages than layers, in all or on one side of the split.
    """
    if layout.pp == 1:
        return layout
    stages = layout.num_stages
    legal = range(max(1, stages - decoder), min(encoder, stages - 1) + 1)
    sides = f"{encoder} encoder and {decoder} decoder layers"
    if not legal:
        raise LayoutError(
            f"T5Config has {sides}, too few for the {stages} stages of pp={layout.pp}, vp={layout.vp}: each needs a"
            f" layer. Use at most {encoder + decoder} stages, or more layers."
        )
    split = layout.pipeline_split_rank
    if split is not None and split not in legal:
        some = f"{legal[0]} to {legal[-1]}" if len(legal) > 1 else f"{legal[0]}"
        raise LayoutError(
            f"MegatronStrategy(pp={layout.pp}, pipeline_split_rank={split}): {split} stages of the encoder and"
            f" {stages - split} of the decoder, but T5Config has {sides}, and each stage needs a layer. Use"
            f" pipeline_split_rank={some}, or None to have it chosen."
        )
    split = split or min(legal, key=lambda at: _slowest_stage(shares(encoder, at), shares(decoder, stages - at), costs))
    return replace(layout, pipeline_split_rank=split)


def stage(layout: ParallelLayout, number: int) -> T5Stage:
    """What stage ``number`` of ``layout.num_stages`` holds."""
    split = layout.pipeline_split_rank
    if split is None:
        return T5Stage(encoder=True, decoder=True, ends_stack=True)
    encodes = number < split
    last = (split if encodes else layout.num_stages) - 1
    copy = number if encodes else number - split
    return T5Stage(encoder=encodes, decoder=not encodes, ends_stack=number == last, copy=copy)


def encoder_stages(layout: ParallelLayout, num_layers: int) -> list[list[str]] | None:
    """megatron-core's ``pipeline_model_parallel_layout`` of the encoder alone."""
    split = layout.pipeline_split_rank
    return None if split is None else _layout(shares(num_layers, split) + [0] * (layout.num_stages - split))


def decoder_stages(layout: ParallelLayout, num_layers: int) -> list[list[str]] | None:
    """megatron-core's ``pipeline_model_parallel_layout`` of the decoder alone."""
    split = layout.pipeline_split_rank
    return None if split is None else _layout([0] * split + shares(num_layers, layout.num_stages - split))


def _layout(layers: list[int]) -> list[list[str]]:
    """It has to begin with the embedding and end with the loss, whether these are the stack's or not."""
    stages = [["decoder"] * count for count in layers]  # megatron-core calls every layer of a stack that
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def shares(num_layers: int, stages: int) -> list[int]:
    """The layers of each stage of a stack; the first ones have one more."""
    return [num_layers // stages + (number < num_layers % stages) for number in range(stages)]


def _slowest_stage(encoder: list[int], decoder: list[int], costs: tuple[int, int]) -> tuple[int, int]:
    """The time of the slower side's fullest stage, then the other side's; each list has the layers of each stage."""
    each = costs[0] * max(encoder), costs[1] * max(decoder)
    return max(each), min(each)
