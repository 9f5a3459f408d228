"""Splits the layers of a T5 over pipeline stages, some for the encoder and the others for the decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from lightning_megatron.distributed.layout import LayoutError, ParallelLayout
from lightning_megatron.distributed.pipeline_cut import core_layout, even
from lightning_megatron.models.pipeline_balance import Balance, LayerTimes


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


def with_split(
    layout: ParallelLayout,
    encoder: int,
    decoder: int,
    costs: tuple[int, int],
    times: Callable[[], list[LayerTimes]] | None = None,
) -> ParallelLayout:
    """The layout with the split that was asked for, or the one whose slowest stage is the fastest.

    Args:
        layout: The layout, with or without a ``pipeline_split_rank`` and ``layers_per_stage``.
        encoder: Layers of the encoder.
        decoder: Layers of the decoder.
        costs: Time of a layer of the encoder and of one of the decoder, in any unit.
        times: Returns the times of both sides, by which "auto" cuts each.

    Raises:
        LayoutError: More stages than layers, in all or on one side of the split; or layers that are not the sides'.
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
    if layout.layers_per_stage == "auto":
        assert times is not None
        return _balanced(layout, times(), [split] if split else legal)
    if isinstance(layout.layers_per_stage, tuple):
        return _with_split_of(layout, layout.layers_per_stage, encoder, decoder)
    split = split or min(legal, key=lambda at: _slowest_stage(even(encoder, at), even(decoder, stages - at), costs))
    return replace(layout, pipeline_split_rank=split)


def _balanced(layout: ParallelLayout, times: list[LayerTimes], splits: Iterable[int]) -> ParallelLayout:
    """The split and the cuts of both sides whose slowest stage is the fastest; virtual stages count each."""
    found = []
    for split in splits:
        sides = [Balance(times[0], split, 1), Balance(times[1], layout.num_stages - split, 1)]
        cuts = [side.cut(side.stages) for side in sides]
        slowest = [max(side.stage_times(cut)) for side, cut in zip(sides, cuts, strict=True)]
        found.append((max(slowest), min(slowest), split, cuts[0] + cuts[1]))
    _, _, split, cut = min(found)
    return replace(layout, pipeline_split_rank=split, layers_per_stage=cut)


def _with_split_of(layout: ParallelLayout, cut: tuple[int, ...], encoder: int, decoder: int) -> ParallelLayout:
    """The split that the layers of the stages say, and the one that was asked for if there is one."""
    asked = layout.pipeline_split_rank
    ends = [at for at in range(1, len(cut)) if sum(cut[:at]) == encoder]
    if not ends or sum(cut) != encoder + decoder or not all(cut) or asked not in (None, *ends):
        split = asked or max(1, min(len(cut) - 1, round(len(cut) * encoder / (encoder + decoder))))
        some = even(encoder, split) + even(decoder, len(cut) - split)
        raise layout.error(
            f"the first {asked or 'stages'} have the {encoder} encoder layers of T5Config, the others its {decoder}"
            f" decoder layers, and each stage has a layer. Use layers_per_stage={some} for instance."
        )
    return replace(layout, pipeline_split_rank=ends[0])


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
    if split is None:
        return None
    return core_layout(side(layout, num_layers, encodes=True) + [0] * (layout.num_stages - split))


def decoder_stages(layout: ParallelLayout, num_layers: int) -> list[list[str]] | None:
    """megatron-core's ``pipeline_model_parallel_layout`` of the decoder alone."""
    split = layout.pipeline_split_rank
    return None if split is None else core_layout([0] * split + side(layout, num_layers, encodes=False))


def side(layout: ParallelLayout, num_layers: int, *, encodes: bool) -> list[int]:
    """The layers of each stage of the encoder, or of the decoder, in a layout that has a split."""
    cut, split = layout.layers_per_stage, layout.pipeline_split_rank or 0
    if isinstance(cut, tuple):
        return list(cut[:split] if encodes else cut[split:])
    return even(num_layers, split if encodes else layout.num_stages - split)


def _slowest_stage(encoder: list[int], decoder: list[int], costs: tuple[int, int]) -> tuple[int, int]:
    """The time of the slower side's fullest stage, then the other side's; each list has the layers of each stage."""
    each = costs[0] * max(encoder), costs[1] * max(decoder)
    return max(each), min(each)
