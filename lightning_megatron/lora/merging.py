"""A model's updates, whole: added to the weights that they update, or written as ``peft`` reads them."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lightning_megatron.hf.pieces import Heads, Piece, Pieces, Same
from lightning_megatron.lora.attach import chosen_of, key_of
from lightning_megatron.lora.config import LoRA

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


class Updates:
    """The updates of a whole model, by transformers' names of the weights.

    Args:
        lora: Their sizes.
        pieces: The model's.
        config: Of the model.
    """

    def __init__(self, lora: LoRA, pieces: Pieces, config: Any) -> None:
        self.lora = lora
        self._heads = Heads.of(config)
        self._places: dict[str, tuple[Piece, str]] = {}  # by the beginning of a key: of which weight of theirs
        for ours, piece in pieces.items():
            for theirs in chosen_of(piece, ours, lora) if ours.endswith(".weight") else ():
                part = theirs.removesuffix(".weight").rpartition(".")[2]
                self._places[f"{key_of(ours)}{part}."] = (piece, theirs)
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}

    def take(self, key: str, tensor: torch.Tensor) -> None:
        """Keep a tensor of an update."""
        beginning, _, name = key.rpartition(".")
        self._tensors.setdefault(f"{beginning}.", {})[name] = tensor

    @cached_property
    def each(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """``A`` and ``B`` of each weight of transformers', ``B`` in its own order of rows; asked when all are taken."""
        found = {}
        for beginning, tensors in self._tensors.items():
            piece, theirs = self._places[beginning]
            segments = [tensors[name] for name in sorted(tensors) if name.startswith("B")]
            found[theirs] = (tensors["A"], self._in_their_order(piece, theirs, torch.cat(segments)))
        return found

    def merge(self, theirs: dict[str, torch.Tensor], transposed: bool) -> None:
        """Add the updates to whole weights of transformers', in place."""
        for name, weight in theirs.items():
            if name in self.each:
                down, up = self.each[name]
                update = self.lora.scale * (up.float() @ down.float())
                weight.copy_(weight.float() + (update.t() if transposed else update))

    def _in_their_order(self, piece: Piece, theirs: str, up: torch.Tensor) -> torch.Tensor:
        if type(piece) is Same:
            return up
        whole = up.size(0) * len(piece.names)  # asked by those alone whose parts are of one size
        rows = [
            torch.arange(row.start, row.start + row.count)
            for row in piece.rows(whole, self._heads)
            if row.name == theirs
        ]
        found = torch.empty_like(up)
        found[torch.cat(rows)] = up
        return found


def write(folder: Path, updates: Updates, task: str, base: str | None, transposed: bool) -> None:
    """Write a directory that ``peft`` loads.

    Args:
        folder: The directory.
        updates: Of the whole model.
        task: peft's name of the task.
        base: What the model came from, if that is known.
        transposed: Whether the updated weights are stored as ``[in, out]``.
    """
    every = updates.each
    tensors = {}
    for theirs, (down, up) in every.items():
        name = _PREFIX + theirs.removesuffix(".weight")
        tensors[f"{name}.lora_A.weight"] = down.contiguous()
        tensors[f"{name}.lora_B.weight"] = up.contiguous()
    lora = updates.lora
    about = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": sorted(name.removesuffix(".weight") for name in every),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _WEIGHTS, {"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(about, indent=2) + "\n")


def read(folder: Path) -> tuple[LoRA, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A directory of ``peft``'s: the sizes, and ``A`` and ``B`` by transformers' name of the weight.

    Raises:
        FileNotFoundError: There is no such directory, or it is no adapter's.
        ValueError: An adapter of another kind.
    """
    if not (folder / _CONFIG).is_file() or not (folder / _WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} is no adapter: it needs {_CONFIG} and {_WEIGHTS}.")
    about = json.loads((folder / _CONFIG).read_text())
    told = {"use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
    for name, usual in told.items():
        if about.get(name, usual) not in (usual, None):
            raise ValueError(f"{folder / _CONFIG} has {name}={about[name]!r}, for which there is no counterpart here.")
    if about.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is an adapter of kind {about.get('peft_type')!r}; only 'LORA' can be loaded.")
    every: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / _WEIGHTS).items():
        weight, _, kind = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        every.setdefault(f"{weight}.weight", {})[kind] = tensor
    lora = LoRA(
        rank=about["r"],
        alpha=about["lora_alpha"],
        dropout=about.get("lora_dropout") or 0.0,
        rslora=bool(about.get("use_rslora")),
        targets=[name.removesuffix(".weight") for name in sorted(every)],
    )
    return lora, {name: (parts["lora_A"], parts["lora_B"]) for name, parts in every.items()}
