"""Low-rank updates of an adapter's model: by the names of its family, attached, loaded and saved."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_megatron import groups, hf
from lightning_megatron.checkpoint.comparison import listed
from lightning_megatron.hf.pieces import Pieces, is_update
from lightning_megatron.hf.whole import WholeTensors, on_first_rank
from lightning_megatron.lora import LoRA
from lightning_megatron.lora.attach import attach, target_names
from lightning_megatron.lora.layer import Adapter
from lightning_megatron.lora.merging import Updates, write
from lightning_megatron.names import whole_name

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
    _check_parts(module, lora.also_train)
    for chunk in module.chunks:
        attach(chunk, lora, pieces, module.config, seed, set(module.new_weights))
        if loaded is None:
            continue
        for adapter in (part for part in chunk.modules() if isinstance(part, Adapter)):
            for number, theirs in enumerate(adapter.chosen):
                _check_shapes(theirs, adapter, number, *loaded[theirs])
                adapter.fill(number, *loaded[theirs])


def _check_parts(module: Any, parts: list[str]) -> None:
    """Refuse parts to train that no stage has.

    Raises:
        ValueError: Names the nearest that there is; on every rank.
    """
    here = {whole_name(chunk, name) for chunk in module.chunks for name, _ in chunk.named_parameters()}
    names = set().union(*groups.gather(here, groups.on_host()))
    known = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    for part in parts:
        if part not in known:
            near = difflib.get_close_matches(part, sorted(known), n=1, cutoff=0.0)
            raise ValueError(f"LoRA(also_train=[{part!r}]): the model has no such part. Did you mean {near[0]!r}?")


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
    _tell_what_stays(module, folder)
    base = module.hparams.get("pretrained_config") or {}
    kind = _TASKS.get(getattr(module.config, "task", family.kind), "FEATURE_EXTRACTION")
    transposed = any(piece.transposed for piece in pieces.values())
    name = base.get("_name_or_path") or None
    on_first_rank(folder, lambda: write(folder, updates, kind, name, transposed))
    return folder


def _tell_what_stays(module: Any, folder: Path) -> None:
    """Warn of parts that were trained whole, of which an adapter of updates has nothing."""
    here = {
        whole_name(chunk, name)
        for chunk in module.chunks
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad and not is_update(name)
    }
    trained = set().union(*groups.gather(here, groups.on_host()))
    if trained:
        rank_zero_warn(
            f"{folder} holds the low-rank updates alone, and these were trained, too; save_pretrained and checkpoints"
            f" have all of it:\n{listed(trained)}"
        )


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
