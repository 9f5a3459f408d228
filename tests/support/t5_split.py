"""Where the strategy splits a T5's pipeline."""

from typing import Any

from lightning_megatron import ParallelLayout, T5Config, T5Module


def split(config: T5Config, **sizes: Any) -> int | None:
    world_size = sizes["pp"]
    return T5Module(config).complete_layout(ParallelLayout(world_size=world_size, **sizes)).pipeline_split_rank
