"""An adapter's directory, as ``peft`` writes and reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lightning_megatron.lora.config import LoRA
from lightning_megatron.lora.merging import Each

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Saved:
    """What a directory holds.

    Args:
        lora: The sizes of the updates.
        updates: ``A`` and ``B``, by transformers' name of the weight.
        whole: Weights that were trained as they are, by transformers' name; ``peft`` calls them ``modules_to_save``.
    """

    lora: LoRA
    updates: Each
    whole: dict[str, torch.Tensor] = field(default_factory=dict)


def write(folder: Path, saved: Saved, task: str, base: str | None, transposed: bool) -> None:
    """Write a directory that ``peft`` loads.

    Args:
        folder: The directory.
        saved: What it holds, of the whole model.
        task: peft's name of the task.
        base: What the model came from, if that is known.
        transposed: Whether the updated weights are stored as ``[in, out]``.
    """
    tensors = {_PREFIX + name: tensor.contiguous() for name, tensor in saved.whole.items()}
    for theirs, (down, up) in saved.updates.items():
        name = _PREFIX + theirs.removesuffix(".weight")
        tensors[f"{name}.lora_A.weight"] = down.contiguous()
        tensors[f"{name}.lora_B.weight"] = up.contiguous()
    lora = saved.lora
    about = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": sorted(name.removesuffix(".weight") for name in saved.updates),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved.whole}) or None,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _WEIGHTS, {"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(about, indent=2) + "\n")


def read(folder: Path) -> Saved:
    """A directory of ``peft``'s.

    Raises:
        FileNotFoundError: There is no such directory, or it is no adapter's.
        ValueError: An adapter of another kind.
    """
    if not (folder / _CONFIG).is_file() or not (folder / _WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} is no adapter: it needs {_CONFIG} and {_WEIGHTS}.")
    about = json.loads((folder / _CONFIG).read_text())
    told = {"use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "trainable_token_indices": None}
    for name, usual in told.items():
        if about.get(name, usual) not in (usual, None):
            raise ValueError(f"{folder / _CONFIG} has {name}={about[name]!r}, for which there is no counterpart here.")
    if about.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is an adapter of kind {about.get('peft_type')!r}; only 'LORA' can be loaded.")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    whole = {}
    for key, tensor in load_file(folder / _WEIGHTS).items():
        name = key.removeprefix(_PREFIX)
        weight, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in ("lora_A", "lora_B"):
            parts.setdefault(f"{weight}.weight", {})[kind] = tensor
        else:
            whole[name] = tensor
    for name, found in parts.items():
        if len(found) < 2:
            raise ValueError(f"{folder / _WEIGHTS} has the {next(iter(found))} of {name}, and not its other half.")
    lora = LoRA(
        rank=about["r"],
        alpha=about["lora_alpha"],
        dropout=about.get("lora_dropout") or 0.0,
        rslora=bool(about.get("use_rslora")),
        targets=[name.removesuffix(".weight") for name in sorted(parts)],
    )
    return Saved(lora, {name: (found["lora_A"], found["lora_B"]) for name, found in parts.items()}, whole)
