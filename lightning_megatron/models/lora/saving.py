"""Gathers what an adapter's directory holds, from the ranks of a run or from a checkpoint, and writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_megatron import hf
from lightning_megatron.checkpoint.mismatches import as_list
from lightning_megatron.hf.weight_mapping import Heads, WeightMapping, is_update, take_apart
from lightning_megatron.models.lora.config import LoRA
from lightning_megatron.models.lora.inject import all_targets
from lightning_megatron.models.lora.merge import Updates
from lightning_megatron.models.lora.peft_files import HEADS, Saved, write

# Layers that peft's ``_MOE_TARGET_MODULE_MAPPING`` takes for those of experts, in families that may have them beside.
_FORMER_EXPERTS = tuple(f".{name}_proj.weight" for name in ("gate", "up", "down"))
_RENAMED_BY_PEFT = ("qwen3_moe", "deepseek_v2", "deepseek_v3")


class AdapterWriter:
    """Takes the tensors of a model that an adapter holds, one after the other, and writes them as ``peft`` does.

    Args:
        family: The model's architecture in transformers.
        config: The model's configuration.
        lora: Rank and scale of the updates.
        trained: Our names of the weights that were trained whole.
        base: transformers' configuration of the pretrained model, if there is one.
    """

    def __init__(
        self, family: hf.Family, config: Any, lora: LoRA, trained: set[str], base: dict[str, Any] | None
    ) -> None:
        self._mapping, self._lora, self._task = family.names(config), lora, config.peft_task
        self._heads = Heads.of(config)
        self._updates = Updates(lora, self._mapping, config)
        self._whole_keys = _in_whole_modules(
            trained, self._mapping, family.tied(config), lora, HEADS.get(self._task, set())
        )
        self._lacking = trained - self._whole_keys
        self._misread = _misread_by_peft(self._mapping, lora) if family.model_type in _RENAMED_BY_PEFT else []
        self._whole: dict[str, torch.Tensor] = {}
        self._base = (base or {}).get("_name_or_path") or None

    def wants(self, key: str) -> bool:
        """Whether a tensor of ours is a part of the adapter."""
        return is_update(key) or key in self._whole_keys

    def take(self, key: str, tensor: torch.Tensor) -> None:
        """Keep a tensor that is a part of the adapter."""
        if is_update(key):
            self._updates.take(key, tensor)
        else:
            self._whole |= take_apart(self._mapping[key], tensor, self._heads)

    def warn(self, folder: Path) -> None:
        """Say which of the weights that were trained have no place in the directory, and which peft misreads."""
        if self._lacking:
            rank_zero_warn(
                f"{folder} lacks these, which were trained whole and which peft has no place for; save_pretrained and"
                f" checkpoints have all of it:\n{as_list(self._lacking)}"
            )
        if self._misread:
            rank_zero_warn(
                f"peft cannot load {folder}: of this family it takes gate_proj, up_proj and down_proj for"
                " former names of the experts' own layers, and these beside them have updates, too:\n"
                f"{as_list(self._misread)}\nload_adapter reads it. For peft, choose LoRA(targets=...) without them; or"
                " use save_pretrained, which merges the updates."
            )

    def write(self, folder: Path) -> None:
        """Write the directory that peft loads."""
        transposed = any(mapped.transposed for mapped in self._mapping.values())
        write(folder, Saved(self._lora, self._updates.each, self._whole), self._task, self._base, transposed)


def _misread_by_peft(mapping: WeightMapping, lora: LoRA) -> list[str]:
    """transformers' names of layers beside experts whose updates ``peft`` takes for those of experts (0.21)."""
    return [name for name in all_targets(mapping, lora) if name.endswith(_FORMER_EXPERTS)]


def _in_whole_modules(
    trained: set[str], mapping: WeightMapping, tied: dict[str, str], lora: LoRA, heads: set[str]
) -> set[str]:
    """Our tensors of the modules of transformers' that an adapter has whole, as ``peft`` has them or not at all.

    Args:
        trained: Our names of what was trained.
        mapping: transformers' tensors that each of the model's tensors is made of.
        tied: Tensors of theirs that ours has once: whole modules of peft's are copies, which tear the tie.
        lora: Which layers have updates; a module that has one cannot be saved whole.
        heads: Modules that are there in any case.
    """
    modules = heads | {name.rpartition(".")[0] for key in trained & mapping.keys() for name in mapping[key].names}
    torn = {*tied, *tied.values(), *all_targets(mapping, lora)}
    fit = {module for module in modules if not any(name.startswith(f"{module}.") for name in torn)}
    whole = tuple(f"{module}." for module in fit)
    return {key for key, mapped in mapping.items() if all(name.startswith(whole) for name in mapped.names)}
