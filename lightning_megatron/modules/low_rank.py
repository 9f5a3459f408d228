"""Low-rank updates of an adapter's model: by the names of its family, attached, loaded and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_megatron import groups, hf
from lightning_megatron.hf.pieces import Pieces, is_update
from lightning_megatron.hf.whole import WholeTensors, on_first_rank
from lightning_megatron.lora import LoRA
from lightning_megatron.lora.attach import attach, target_names
from lightning_megatron.lora.layer import Adapter
from lightning_megatron.lora.merging import Updates, write

_TASKS = {
    "GPT": "CAUSAL_LM",
    "T5": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
}
# By transformers' name of the weight: A and B.
Loaded = dict[str, tuple[torch.Tensor, torch.Tensor]]


def pieces_of(module: Any) -> Pieces:
    """What the model's weights are made of: by what it came from, or by the first family that has such a model."""
    family = _family(module)
    return {} if family is None else family.pieces(module.config)


def check(module: Any) -> None:
    """Refuse targets that the model does not have.

    Raises:
        ValueError: Names the nearest that there are.
    """
    if module.lora is not None and module.lora.targets != "all-linear":
        module.lora.check_targets(target_names(pieces_of(module)))


def put_in(module: Any, loaded: Loaded | None) -> None:
    """Put updates beside the layers of a module's chunks, and freeze the rest.

    Raises:
        ValueError: What was loaded is not of this model.
    """
    lora: LoRA = module.lora
    pieces = pieces_of(module)
    seed = groups.gather(torch.initial_seed(), groups.on_host())[0]
    for chunk in module.chunks:
        attach(chunk, lora, pieces, module.config, seed, set(module.new_weights))
        if loaded is None:
            continue
        for adapter in (part for part in chunk.modules() if isinstance(part, Adapter)):
            for number, theirs in enumerate(adapter.chosen):
                _check_shapes(theirs, adapter, number, *loaded[theirs])
                adapter.fill(number, *loaded[theirs])


def save(module: Any, folder: Path) -> Path:
    """Write the updates as ``peft`` reads them; all ranks call this.

    Raises:
        ValueError: The module has none, or no family of transformers' has its model.
        RuntimeError: The first rank could not write; on every rank.
    """
    family = _family(module)
    if module.lora is None or family is None:
        why = "has no LoRA(...)" if module.lora is None else "is of no family of transformers'"
        raise ValueError(f"{type(module).__name__}.save_adapter: the module {why}. Use save_pretrained.")
    pieces = family.pieces(module.config)
    updates = Updates(module.lora, pieces, module.config)
    for key, tensor in WholeTensors(module, only=is_update):
        if tensor is not None:
            updates.take(key, tensor)
    base = module.hparams.get("pretrained_config") or {}
    kind = _TASKS.get(getattr(module.config, "task", family.kind), "FEATURE_EXTRACTION")
    transposed = any(piece.transposed for piece in pieces.values())
    name = base.get("_name_or_path") or None
    on_first_rank(folder, lambda: write(folder, updates, kind, name, transposed))
    return folder


def _family(module: Any) -> hf.Family | None:
    base = module.hparams.get("pretrained_config")
    if base is not None:
        return hf.family_of(base["model_type"])
    try:
        return hf.family_for(module.config)
    except hf.UnsupportedConfigError:
        return None


def _check_shapes(theirs: str, adapter: Any, number: int, down: torch.Tensor, up: torch.Tensor) -> None:
    wanted = (adapter.lora.rank, adapter.num_inputs), (int((adapter.owner == number).sum()), adapter.lora.rank)
    seen = tuple(down.shape), tuple(up.shape)
    if seen != wanted:
        raise ValueError(f"The adapter's update of {theirs} has shapes {seen}, and this model's {wanted}.")
