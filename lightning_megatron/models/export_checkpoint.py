"""Writes a checkpoint as a directory that transformers loads, or its updates as one for peft, on one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_megatron.checkpoint import CheckpointError, consolidate
from lightning_megatron.hf.export import Target
from lightning_megatron.hf.family import family_for, family_of, kind_of
from lightning_megatron.hf.original_settings import Origin
from lightning_megatron.hf.weight_mapping import is_update
from lightning_megatron.models.lora.merge import Updates
from lightning_megatron.models.lora.saving import AdapterWriter


def export_pretrained(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    family: str | None = None,
) -> Path:
    """Write a directory that ``transformers`` loads from a checkpoint of any layout, tensor by tensor.

    Args:
        checkpoint: A checkpoint's directory.
        directory: The directory to write; weights of an earlier call are replaced.
        tokenizer: One of transformers', saved beside the weights; or a name or directory of one.
        dtype: Type of the weights, such as "bfloat16". None: the type that they were loaded in; of a model that was not
            pretrained, the type that they have.
        max_shard_size: Largest size of a file of weights, such as "1.5GB" or "5GiB"; a larger model has several files
            and an index.
        family: transformers' ``model_type``. None: the one that the module was loaded from, or the first that fits.

    Returns:
        The directory.

    Raises:
        CheckpointError: The checkpoint is incomplete, or not of a GPT, BERT or T5 module.
        UnsupportedConfigError: The family has no such model.
    """
    path = Path(checkpoint)
    arguments = _arguments_of(path)
    config = arguments["config"]
    if isinstance(tokenizer, str | Path):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    origin = Origin.of(arguments)
    lora = arguments.get("lora")
    updates = None if lora is None else partial(Updates, lora, config=config)
    target = Target.choose(config, origin, family, dtype, max_shard_size, tokenizer, updates)
    return target.write_checkpoint(Path(directory), path)


def export_adapter(checkpoint: str | Path, directory: str | Path, *, family: str | None = None) -> Path:
    """Write the low-rank updates of a checkpoint, and what was trained whole, as ``peft`` loads them.

    Args:
        checkpoint: A checkpoint's directory, of any layout.
        directory: The directory to write.
        family: transformers' ``model_type``. None: the one that the module was loaded from, or the first that fits.

    Returns:
        The directory.

    Raises:
        CheckpointError: The checkpoint is incomplete, not of a GPT, BERT or T5 module, or has no updates.
        UnsupportedConfigError: The family has no such model.
    """
    path, folder = Path(checkpoint), Path(directory)
    arguments = _arguments_of(path)
    config, lora, base = arguments["config"], arguments.get("lora"), arguments.get("pretrained_config")
    if lora is None:
        raise CheckpointError(
            f"{path} has no low-rank updates: its module was trained without lora=LoRA(...). Leave --adapter out, and"
            " export the whole model."
        )
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; name a directory.")
    name = family or (base or {}).get("model_type")
    found = family_of(name) if name else family_for(config)
    writer = AdapterWriter(found, config, lora, _trained_whole(path, lora.also_train), base)
    wanted = {key for key in consolidate.shapes_and_dtypes(path) if writer.wants(key)}
    for key, tensor in consolidate.tensors(path, only=wanted):
        writer.take(key, tensor)
    writer.warn(folder)
    writer.write(folder)
    return folder


def _arguments_of(path: Path) -> dict[str, Any]:
    """The arguments of the module that wrote a checkpoint, its files checked.

    Raises:
        CheckpointError: The checkpoint is incomplete, or not of a GPT, BERT or T5 module.
    """
    consolidate.verified_manifest(path)
    arguments: dict[str, Any] = consolidate.state_of(path, trust=False).get("hyper_parameters", {})
    if not kind_of(arguments.get("config")):
        raise CheckpointError(
            f"{path} holds no configuration of a GPT, BERT or T5: no GPTModule, BertModule or T5Module wrote it. Export"
            " its weights to a .safetensors file instead."
        )
    return arguments


def _trained_whole(path: Path, parts: list[str]) -> set[str]:
    """Our names of the weights that were trained whole: of these parts, and all that the optimizer has states of."""
    optimized = consolidate.optimized(path)
    begin = tuple(f"{part}." for part in parts)
    every = {key for key in consolidate.shapes_and_dtypes(path) if not is_update(key)}
    return {key for key in every if key.startswith(begin) or key in optimized}
