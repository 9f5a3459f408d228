"""Reads and writes an adapter's directory as ``peft`` does."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lightning_megatron.models.lora import expert_updates, former_experts
from lightning_megatron.models.lora.config import LoRA
from lightning_megatron.models.lora.merge import Each

_WEIGHTS, _PICKLED, _CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
_PREFIX = "base_model.model."
# What peft trains whole, and saves, for some tasks without being asked.
HEADS = {"SEQ_CLS": {"classifier", "score"}, "TOKEN_CLS": {"classifier", "score"}, "QUESTION_ANS": {"qa_outputs"}}

# Fields of peft's ``LoraConfig``. Any other that is set changes what an adapter gives, one of a later version included.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "modules_to_save", "ensure_weight_tying"}
_READ |= {"init_lora_weights"}
# What they say of layers is in the names of the tensors; the rest is bookkeeping, or of models and starts that are not
# here.
_WITHOUT_EFFECT = {
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
}
_WITHOUT_EFFECT |= {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_WITHOUT_EFFECT |= {"inference_mode", "runtime_config", "megatron_config", "megatron_core", "qalora_group_size"}
_WITHOUT_EFFECT |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
# First weights of updates that leave the model beneath as it is.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Saved:
    """What a directory holds.

    Args:
        lora: The sizes of the updates.
        updates: ``A`` and ``B``, by transformers' name of the weight.
        whole: Further weights, by transformers' name: those that were trained as they are, ``peft``'s
            ``modules_to_save``, and embeddings that it saves beside them.
        frozen: Those of them that were not trained.
        ties: Whether weights that are tied were trained as one.
    """

    lora: LoRA
    updates: Each
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    ties: bool = False


def write(folder: Path, saved: Saved, task: str, base: str | None, transposed: bool) -> None:
    """Write a directory that ``peft`` loads.

    Args:
        folder: The directory.
        saved: The updates of the whole model, and other weights that were trained.
        task: peft's name of the task.
        base: Name or directory of the model that the updates belong to, if it is known.
        transposed: Whether the updated weights are stored as ``[in, out]``.
    """
    tensors = {_PREFIX + name: tensor.contiguous() for name, tensor in saved.whole.items()}
    of_experts = [name for name, (down, _) in saved.updates.items() if down.dim() == 3]
    for theirs, (down, up) in saved.updates.items():
        path = theirs.removesuffix(".weight")
        if theirs in of_experts:
            path = expert_updates.path(theirs, of_experts)
            down, up = expert_updates.flat(down, up)
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = down.contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = up.contiguous()
    lora = saved.lora
    about = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0 if of_experts else lora.dropout,  # peft loads no updates of experts with dropout
        "use_rslora": lora.rslora,
        "target_modules": sorted(name.removesuffix(".weight") for name in saved.updates.keys() - set(of_experts)),
        "target_parameters": sorted(of_experts) or None,
        "modules_to_save": sorted({_outermost(name, HEADS.get(task, ())) for name in saved.whole}) or None,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _WEIGHTS, {"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(about, indent=2) + "\n")


def base_of(folder: Path) -> str | Path | None:
    """The model that an adapter's directory is of: in the directory itself, or what it names; None: it is no adapter's.

    Raises:
        ValueError: The directory names no model.
    """
    if not (folder / _CONFIG).is_file():
        return None
    if (folder / "config.json").is_file():
        return folder
    base = json.loads((folder / _CONFIG).read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder / _CONFIG} does not say what it is an adapter of. Load that, and call load_adapter.")
    return str(base)


def read(folder: Path) -> Saved:
    """A directory of ``peft``'s.

    Raises:
        FileNotFoundError: There is no such directory, or it is no adapter's.
        ValueError: An adapter of another kind.
    """
    if not (folder / _CONFIG).is_file() or not any((folder / name).is_file() for name in (_WEIGHTS, _PICKLED)):
        raise FileNotFoundError(f"{folder} is no adapter: it needs {_CONFIG} and {_WEIGHTS}.")
    about = json.loads((folder / _CONFIG).read_text())
    _check(folder, about)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    whole = {}
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in _tensors(folder).items()}
    for name, tensor in tensors.items():
        plain = name.replace(".modules_to_save.", ".").replace(".original_module.", ".")
        if plain != name and plain in tensors:
            continue  # beside saved embeddings, peft writes a head that is trained whole again, under its inner names
        weight, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in ("lora_A", "lora_B"):
            parts.setdefault(f"{weight}.weight", {})[kind] = tensor
        elif "lora_" in kind:
            raise ValueError(f"{folder} has {name}, a part of an update which has no counterpart here.")
        else:
            whole[name] = tensor
    for name, found in parts.items():
        if len(found) < 2:
            raise ValueError(f"{folder} has the {next(iter(found))} of {name}, and not its other half.")
    pairs = {name: (found["lora_A"], found["lora_B"]) for name, found in parts.items()}
    rank, alpha, rslora = about.get("r", 8), about.get("lora_alpha", 8), bool(about.get("use_rslora"))
    updates = expert_updates.stacked(pairs, rank, about.get("target_parameters") or [], rank * _fused(about))
    updates = former_experts.of_one_rank(former_experts.joined(updates))
    factor = next((up.size(-1) // rank for _, up in updates.values()), 1)
    if factor > 1:  # the scale stays what it was
        alpha *= math.sqrt(factor) if rslora else factor
    lora = LoRA(
        rank=rank * factor,
        alpha=alpha,
        dropout=about.get("lora_dropout") or 0.0,
        rslora=rslora,
        targets=[name.removesuffix(".weight") for name in sorted(updates)],
    )
    trained = tuple(about.get("modules_to_save") or ())
    return Saved(
        lora,
        updates,
        whole,
        frozen=frozenset(name for name in whole if not any(path.endswith(trained) for path in _modules_of(name))),
        ties=bool(about.get("ensure_weight_tying")),
    )


def _outermost(weight: str, heads: Collection[str]) -> str:
    """The module of a weight, or the head that has such modules in it, as RoBERTa's has two layers."""
    inner, *outer = _modules_of(weight)
    return next((module for module in outer if module in heads), inner)


def _modules_of(weight: str) -> list[str]:
    """The modules that a weight is in, from the innermost."""
    return [weight.rsplit(".", depth)[0] for depth in range(1, weight.count(".") + 1)]


def _check(folder: Path, about: dict[str, Any]) -> None:
    """Refuse what would not give what it gives in ``peft``.

    Raises:
        ValueError: Names the field and its value.
    """
    if about.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is an adapter of kind {about.get('peft_type')!r}; only 'LORA' can be loaded.")
    start = about.get("init_lora_weights", True)
    if start is not None and start not in _STARTS:
        raise ValueError(
            f"{folder / _CONFIG} has init_lora_weights={start!r}, by which peft {_why(str(start))}. Merge it with peft"
            " (merge_and_unload) and load that model, or have peft convert it (save_pretrained(...,"
            " path_initial_model_for_weight_conversion=...))."
        )
    for name, value in about.items():
        if name in ("rank_pattern", "alpha_pattern") and _fused(about) > 1:
            continue
        if name not in _READ | _WITHOUT_EFFECT and value and value != "none":
            raise ValueError(
                f"{folder / _CONFIG} has {name}={value!r}, for which there is no counterpart here. Merge it with peft"
                " (merge_and_unload) and load that model."
            )


def _fused(about: dict[str, Any]) -> int:
    """How many former layers ``peft`` has joined to an expert's ``gate_up_proj``, whose rank is so many times as large.

    Its scale is the others' then. 1: the patterns say nothing of the kind.
    """
    ranks, alphas = about.get("rank_pattern") or {}, about.get("alpha_pattern") or {}
    if len(ranks) != 1 or ranks.keys() != alphas.keys() or about.get("use_rslora"):
        return 1
    ((pattern, rank),) = ranks.items()
    times = rank // about.get("r", 8)
    fits = times * about.get("r", 8) == rank and times * about.get("lora_alpha", 8) == alphas[pattern]
    return times if fits and pattern.endswith("gate_up_proj") else 1


def _why(start: str) -> str:
    if start.lower() == "mica":
        return "freezes one half of each update"
    return "changes the weights of the model beneath, too"


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / _WEIGHTS).is_file():
        return load_file(folder / _WEIGHTS)
    found: dict[str, torch.Tensor] = torch.load(folder / _PICKLED, map_location="cpu", weights_only=True)
    return found
