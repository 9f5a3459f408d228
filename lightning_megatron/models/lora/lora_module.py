"""Adds low-rank updates to a module's model by its family's names, and loads and saves them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_megatron import hf
from lightning_megatron.checkpoint.mismatches import as_list
from lightning_megatron.distributed import collectives, process_groups
from lightning_megatron.distributed.suggestions import did_you_mean
from lightning_megatron.hf.gather import WholeTensors, on_first_rank
from lightning_megatron.hf.weight_mapping import Read, Shape, WeightMapping, is_update
from lightning_megatron.models.lora import LoRA
from lightning_megatron.models.lora.expert_adapter import ExpertAdapter
from lightning_megatron.models.lora.inject import inject, router_names, target_names
from lightning_megatron.models.lora.layer import Adapter
from lightning_megatron.models.lora.peft_files import Saved, base_of
from lightning_megatron.models.lora.saving import AdapterWriter


def weight_mapping_of(module: Any) -> WeightMapping:
    """What the model's weights are made of: by what it came from, or by the first family that has such a model."""
    family = _family(module)
    return {} if family is None else family.names(module.config)


def check(module: Any) -> None:
    """Refuse targets that the model does not have, and layers that updates would leave as they were drawn.

    Raises:
        ValueError: Names the nearest targets that there are; or what to leave out.
    """
    if module.lora is not None and getattr(module.config, "mtp", None):
        raise ValueError(
            f"{type(module).__name__}(lora=...) trains no layers of multi-token prediction, and the configuration has"
            f" mtp={module.config.mtp}. Use mtp=0."
        )
    if module.lora is not None and module.lora.targets != "all-linear":
        mapping, config = weight_mapping_of(module), module.config
        module.lora.check_targets(target_names(mapping, config), router_names(mapping, config))


def matched(module: Any, saved: Saved) -> Saved:
    """An adapter whose weights that are no updates are found in a module's model; its ``lora`` trains their parts.

    Raises:
        ValueError: The model has no such weights, has them tied to others, or needs further ones beside them.
    """
    family, mapping = _family(module), weight_mapping_of(module)
    ours = {name: key for key, mapped in mapping.items() for name in mapped.names}
    tied = family.tied(module.config) if family else {}
    both = sorted((saved.whole.keys() - saved.frozen) & {*tied, *tied.values()})
    if both and not saved.ties:
        raise ValueError(
            f"The adapter holds {both[0]} whole, which peft trains apart from what it is tied to; this model has one"
            " tensor of both. Merge the adapter into the model with peft, and load that."
        )
    # Of weights that are one tensor here, the adapter may have either name, or both.
    whole = {tied.get(name, name): tensor for name, tensor in saved.whole.items()}
    frozen = {tied.get(name, name) for name in saved.frozen}
    saved = replace(saved, whole=whole, frozen=frozenset(frozen))
    unknown = sorted(saved.whole.keys() - ours.keys())
    if unknown:
        task = getattr(module.config, "task", None)
        of_task = (
            "" if task is None else f" with task={task!r}; from_pretrained(..., config={{'task': ...}}) has others"
        )
        raise ValueError(f"The adapter holds weights that have no place in the model{of_task}:\n{as_list(unknown)}")
    keys = {ours[name] for name in saved.whole}
    missing = sorted({name for key in keys for name in mapping[key].names} - saved.whole.keys())
    if missing:
        raise ValueError(
            f"The adapter lacks weights that megatron-core has in one tensor with some of its own:\n{as_list(missing)}"
        )
    trained = {ours[name] for name in saved.whole.keys() - saved.frozen}
    parts = sorted({key.rpartition(".")[0] for key in trained})
    return replace(saved, lora=replace(saved.lora, also_train=parts))


def base_and_adapter(source: Any) -> tuple[Any, Path | None]:
    """What a source of weights is read from, and the adapter that is to be put in then, where it is one's directory.

    As in transformers: a directory with ``adapter_config.json`` is its own model and the adapter on it; with no model
    in it, it is of the model that it names.
    """
    if not isinstance(source, str | Path):
        return source, None
    base = base_of(Path(source))
    return (source, None) if base is None else (base, Path(source))


def inject_updates(module: Any) -> None:
    """Put updates beside the layers of a module's chunks, and freeze the rest.

    Raises:
        ValueError: There is no part that is to be trained whole, or no layer that a target names; on every rank.
    """
    lora: LoRA = module.lora
    mapping = weight_mapping_of(module)
    seed = collectives.gather(torch.initial_seed(), process_groups.gloo_world())[0]
    _check_parts(module, lora.also_train)
    names: set[str] = set()
    for chunk in module.chunks:
        names |= inject(chunk, lora, mapping, module.config, seed, set(module.new_weights))
    if lora.targets != "all-linear":
        lora.check_targets(set().union(*collectives.gather(names, process_groups.gloo_world())))


def load_updates(module: Any, saved: Saved) -> None:
    """Give a module's built chunks what an adapter holds; all ranks call this.

    Raises:
        ValueError: Shapes differ; on every rank.
    """
    places = [
        (adapter, number, theirs)
        for adapter in module.chunks.modules()
        if isinstance(adapter, Adapter | ExpertAdapter)
        for number, theirs in enumerate(adapter.chosen)
    ]
    problems = [_misfit(theirs, adapter, number, *saved.updates[theirs]) for adapter, number, theirs in places]
    found = sorted(
        {problem for many in collectives.gather(problems, process_groups.gloo_world()) for problem in many if problem}
    )
    if found:
        raise ValueError(found[0])
    for adapter, number, theirs in places:
        adapter.fill(number, *saved.updates[theirs])
    if saved.whole:
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.whole.items()}
        hf.fill(module, weight_mapping_of(module), shapes, _reading(saved.whole), "The adapter")


def _reading(tensors: dict[str, torch.Tensor]) -> Read:
    def read(name: str, offset: Shape, sizes: Shape) -> torch.Tensor:
        return tensors[name][tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))]

    return read


def _check_parts(module: Any, parts: list[str]) -> None:
    """Refuse parts to train that no stage has.

    Raises:
        ValueError: Names the nearest that there is; on every rank.
    """
    here = {name for name, _ in module.named_shards()}
    names = set().union(*collectives.gather(here, process_groups.gloo_world()))
    known = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    for part in parts:
        if part not in known:
            hint = did_you_mean(part, sorted(known), similarity=0)
            raise ValueError(f"LoRA(also_train=[{part!r}]): the model has no such part.{hint}")


def save(module: Any, folder: Path) -> Path:
    """Write the updates, and what was trained whole, as ``peft`` reads them; all ranks call this.

    Raises:
        ValueError: The module has none, or no family of transformers' has its model.
        RuntimeError: The first rank could not write; on every rank.
    """
    family = _family(module)
    if module.lora is None or family is None:
        why = "has no LoRA(...)" if module.lora is None else "is of no family of transformers'"
        raise ValueError(f"{type(module).__name__}.save_adapter: the module {why}. Use save_pretrained.")
    base = module.hparams.get("pretrained_config")
    writer = AdapterWriter(family, module.config, module.lora, _trained_whole(module), base)
    for key, tensor in WholeTensors(module, only=writer.wants):
        if tensor is not None:
            writer.take(key, tensor)
    writer.warn(folder)
    on_first_rank(folder, lambda: writer.write(folder))
    return folder


def _trained_whole(module: Any) -> set[str]:
    """Weights of the whole model that are trained as they are."""
    here = {name for name, parameter in module.named_shards() if parameter.requires_grad and not is_update(name)}
    return set().union(*collectives.gather(here, process_groups.gloo_world()))


def _family(module: Any) -> hf.Family | None:
    base = module.hparams.get("pretrained_config")
    if base is not None:
        return hf.family_of(base["model_type"])
    try:
        return hf.family_for(module.config)
    except hf.UnsupportedConfigError:
        return None


def _misfit(theirs: str, adapter: Any, number: int, down: torch.Tensor, up: torch.Tensor) -> str:
    wanted = adapter.shapes(number)
    seen = tuple(down.shape), tuple(up.shape)
    return "" if seen == wanted else f"The adapter's update of {theirs} has shapes {seen}, and this model's {wanted}."
