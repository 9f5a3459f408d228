"""Which layers of a T5 are on which pipeline stage: the split of the stages, and even shares on each side."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_megatron.layers.t5_model import T5Stage
from lightning_megatron.layout import LayoutError, ParallelLayout

if TYPE_CHECKING:
    from lightning_megatron.modules.t5_config import T5Config


def with_split(layout: ParallelLayout, config: T5Config) -> ParallelLayout:
    """The layout with the split that was asked for, or the one whose slowest stage is the fastest.

    Raises:
        LayoutError: More stages than layers, in all or on one side of the split.
    """
    if layout.pp == 1:
        return layout
    encoder, decoder, stages = config.encoder_layers, config.decoder_layers, layout.num_stages
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
    split = split or min(legal, key=lambda at: _slowest_stage(config, at, stages - at))
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
    return None if split is None else _layout(_shares(num_layers, split) + [0] * (layout.num_stages - split))


def decoder_stages(layout: ParallelLayout, num_layers: int) -> list[list[str]] | None:
    """megatron-core's ``pipeline_model_parallel_layout`` of the decoder alone."""
    split = layout.pipeline_split_rank
    return None if split is None else _layout([0] * split + _shares(num_layers, layout.num_stages - split))


def _layout(layers: list[int]) -> list[list[str]]:
    """It has to begin with the embedding and end with the loss, whether these are the stack's or not."""
    stages = [["decoder"] * count for count in layers]  # megatron-core calls every layer of a stack that
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def _shares(num_layers: int, stages: int) -> list[int]:
    return [num_layers // stages + (number < num_layers % stages) for number in range(stages)]


def _slowest_stage(config: T5Config, encoder_stages: int, decoder_stages: int) -> tuple[int, int]:
    """What the slower side's fullest stage costs, then the other side's."""
    encoder, decoder = _costs(config)
    each = (
        encoder * max(_shares(config.encoder_layers, encoder_stages)),
        decoder * max(_shares(config.decoder_layers, decoder_stages)),
    )
    return max(each), min(each)


def _costs(c: T5Config) -> tuple[int, int]:
    """Multiplications of one sequence in a layer of the encoder, and in one of the decoder."""
    heads = (c.kv_channels or c.hidden_size // c.num_attention_heads) * c.num_attention_heads
    projection = c.hidden_size * heads  # each of query, key, value and output, a token
    feed_forward = (3 if c.is_gated else 2) * c.hidden_size * (c.ffn_hidden_size or 4 * c.hidden_size)
    source, target = c.seq_length, c.decoder_seq_length or c.seq_length

    def layer(tokens: int) -> int:
        return tokens * (4 * projection + feed_forward + 2 * tokens * heads)

    crossing = 2 * projection * (source + target) + 2 * source * target * heads
    return layer(source), layer(target) + crossing
