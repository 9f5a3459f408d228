"""``export_pretrained``: writes a checkpoint as a directory that transformers loads, on one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_megatron.checkpoint import CheckpointError, consolidate
from lightning_megatron.hf.export import Target
from lightning_megatron.hf.family import kind_of
from lightning_megatron.hf.original_settings import Origin
from lightning_megatron.models.lora.merge import Updates


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
    consolidate.verified_manifest(path)
    arguments = consolidate.state_of(path, trust=False).get("hyper_parameters", {})
    config = arguments.get("config")
    if not kind_of(config):
        raise CheckpointError(
            f"{path} holds no configuration of a GPT, BERT or T5: no GPTModule, BertModule or T5Module wrote it. Export"
            " its weights to a .safetensors file instead."
        )
    if isinstance(tokenizer, str | Path):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    origin = Origin.of(arguments)
    lora = arguments.get("lora")
    updates = None if lora is None else partial(Updates, lora, config=config)
    target = Target.choose(config, origin, family, dtype, max_shard_size, tokenizer, updates)
    return target.write_checkpoint(Path(directory), path)
