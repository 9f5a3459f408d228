"""Lists what a model of the user's own lacks, all at once, before a step is run on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from megatron.core.model_parallel_config import ModelParallelConfig

from lightning_megatron.distributed import collectives, parameter_names
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.build_settings import BuildSettings
from lightning_megatron.training.counted_once import is_divided_expert

_PAGE = "docs/own_model.md shows whole models."
_METHODS = {
    "build_model": "(self, pre_process, post_process, vp_stage): returns this rank's part of the model, a ModelChunk",
    "loss": "(self, output, batch): returns the loss of a micro-batch from the model's output",
}
_OF_PIPELINES = {
    "sequence_length": "(self, batch): returns s of the hidden states [s, b, h] that travel between pipeline stages"
}
_OF_SHARED_ROWS = {
    "shard_inputs": "(self, inputs): returns the inputs with this rank's part of each sequence, which cp > 1 divides"
}
# What schedules, gradients and checkpoints ask of a chunk.
_ATTRIBUTES = (
    "config",
    "model_type",
    "pre_process",
    "post_process",
    "set_input_tensor",
    "share_embeddings_and_output_weights",
    "sharded_state_dict",
)


def check_methods(module: Any, bases: tuple[type, ...], layout: ParallelLayout) -> None:
    """Refuse a module without the methods that a run asks for, before a process group exists.

    Args:
        module: The module.
        bases: The classes that only declare the methods.
        layout: The parallel sizes.

    Raises:
        MisconfigurationException: Methods are missing; the message lists all of them.
    """
    wanted = {
        **_METHODS,
        **(_OF_PIPELINES if layout.pp > 1 else {}),
        **(_OF_SHARED_ROWS if layout.cp > 1 else {}),
    }
    declared = [vars(base).get(name) for base in bases for name in wanted]
    lines = [f"{name}{says}." for name, says in wanted.items() if getattr(type(module), name) in declared]
    _refuse(f"{type(module).__name__} lacks methods that this run calls", lines)


def check_chunks(module: Any, settings: BuildSettings, stage: int) -> None:
    """Refuse chunks that lack what schedules, gradients and checkpoints ask of them; all pipeline stages call this.

    Args:
        module: The module, whose chunks are built.
        settings: The run's settings.
        stage: Number of this pipeline stage.

    Raises:
        MisconfigurationException: Something is missing on any stage; the message lists all of it, on every stage.
    """
    layout, lines = settings.layout, []
    for number, chunk in enumerate(module.chunks):
        where = f"pipeline stage {stage}" + (f", virtual stage {number}" if layout.vp else "")
        lines += [f"{type(chunk).__name__} on {where} {text}" for text in _lacks(chunk, settings)]
    names = [name for name, weight in _named_weights(module) if not getattr(weight, "shared_embedding", False)]
    marked = any(getattr(p, "tensor_model_parallel", False) or is_divided_expert(p) for p in module.parameters())
    gathered = collectives.gather_from_stages((lines, names, marked))
    lines = list(dict.fromkeys(line for each, _, _ in gathered for line in each))
    lines += _twice([name for _, each, _ in gathered for name in each])
    if layout.tp > 1 and not any(each for _, _, each in gathered):
        lines.append(
            f"No weight is shared out, so each of the {layout.tp} tensor-parallel ranks holds all of them: use"
            " ColumnParallelLinear, RowParallelLinear, self.transformer_block() and the like, or tp=1."
        )
    _refuse(f"{type(module).__name__}.build_model made a model that this run cannot train", lines)


def check_built(module: Any, chunk: Any) -> None:
    """Refuse what is no model at all."""
    if not isinstance(chunk, torch.nn.Module):
        text = f"build_model returned {chunk!r:.100}, and a torch.nn.Module is wanted. Return the model."
        raise MisconfigurationException(f"{type(module).__name__}: {text} {_PAGE}")


def _lacks(chunk: torch.nn.Module, settings: BuildSettings) -> Iterator[str]:
    missing = [name for name in _ATTRIBUTES if not hasattr(chunk, name)]
    if missing:
        yield (
            f"has no {', '.join(missing)}: make it a subclass of lightning_megatron.ModelChunk, which has, and call"
            " super().__init__(config, pre_process, post_process, vp_stage) in its __init__."
        )
    config = getattr(chunk, "config", None)
    if config is None:
        return
    if not isinstance(config, ModelParallelConfig):
        yield f"has a {type(config).__name__} as config, not megatron-core's: use self.transformer_config(...)."
        return
    differing = [
        f"{name}={getattr(config, name, None)!r} where the run has {value!r}"
        for name, value in settings.transformer_config_arguments().items()
        if getattr(config, name, None) != value
    ]
    if differing:
        yield (
            f"has a config with {', '.join(differing)}: make it with self.transformer_config(...), which takes these"
            " from the run."
        )


def _named_weights(module: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for chunk in module.chunks:
        yield from parameter_names.named_shards(chunk)


def _twice(names: list[str]) -> list[str]:
    several = [name for name, count in Counter(names).items() if count > 1]
    if not several:
        return []
    shown = ", ".join(several[:3]) + (f" and {len(several) - 3} more" if len(several) > 3 else "")
    return [
        f"Weights of several chunks have one name: {shown}. Build a weight on one chunk only (if self.pre_process, if"
        " self.post_process), and give layers that are shared out over chunks their number in the whole model:"
        " layer.layer_number, from self.layer_numbers, in a ModuleList called layers."
    ]


def _refuse(what: str, lines: list[str]) -> None:
    if lines:
        listed = "".join(f"\n  - {line}" for line in lines)
        raise MisconfigurationException(f"{what}:{listed}\n{_PAGE}")
