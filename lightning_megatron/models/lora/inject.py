"""Adds low-rank updates to a model's linear layers, and freezes all other weights."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from lightning_megatron.distributed.parameter_names import named_shards, whole_name
from lightning_megatron.hf.weight_mapping import UPDATE, Heads, Same, TensorMapping, WeightMapping
from lightning_megatron.models.lora.config import LoRA
from lightning_megatron.models.lora.expert_adapter import ExpertAdapter
from lightning_megatron.models.lora.layer import Adapter


def inject(
    chunk: torch.nn.Module, lora: LoRA, mapping: WeightMapping, config: Any, seed: int, also: set[str]
) -> set[str]:
    """Give a chunk's target layers updates, and freeze what is not trained.

    Args:
        chunk: One of the model's chunks.
        lora: Which layers to update, and the sizes of the updates.
        mapping: transformers' tensors that each of the whole model's is made of; empty if it has no family.
        config: Configuration of the model.
        seed: Seed of the first weights; the same on all ranks.
        also: Names of whole tensors that are trained as they are.

    Returns:
        All names of the chunk's linear layers.
    """
    whole_parts = tuple(f"{part}." for part in lora.also_train)
    for whole, parameter in named_shards(chunk):
        parameter.requires_grad_(parameter.requires_grad and (whole in also or whole.startswith(whole_parts)))
    heads, names = Heads.of(config), set()
    for name, linear in list(_linears(chunk)):
        whole = whole_name(chunk, f"{name}.weight")
        mapped = mapping.get(whole, Same(whole))
        names |= {each.removesuffix(".weight") for each in (whole, *mapped.names)}
        chosen = targets_of(mapped, whole, lora)
        if not chosen:
            continue
        adapter: Adapter | ExpertAdapter
        if _holds_experts(linear):
            adapter = ExpertAdapter(linear, chosen[0], lora)
        else:
            halves = config.is_gated and name.endswith("linear_fc1")
            adapter = Adapter(linear, mapped, chosen, heads, lora, halves)
        for number, theirs in enumerate(chosen):
            adapter.start(number, (seed + zlib.crc32(theirs.encode())) % 2**31)
        parent, _, leaf = name.rpartition(".")
        chunk.get_submodule(parent).add_module(leaf + UPDATE, adapter)
        linear.register_forward_hook(_AddUpdate(adapter))
    if getattr(chunk, "pre_process", False):
        # Else nothing before the first update needs a gradient, and recomputed layers would have none.
        chunk.embedding.register_forward_hook(_wants_gradient)  # type: ignore[union-attr]
    return names


def targets_of(mapped: TensorMapping, ours: str, lora: LoRA) -> list[str]:
    """The targets among transformers' weights that a layer is made of; a head, a norm or an embedding is none."""
    if not is_of_linear(ours):
        return []
    mine = ours.removesuffix(".weight")
    return [name for name in mapped.names if lora.matches(name.removesuffix(".weight"), mine)]


def all_targets(mapping: WeightMapping, lora: LoRA) -> list[str]:
    """The targets among transformers' weights that a model is made of."""
    return [name for ours, mapped in mapping.items() for name in targets_of(mapped, ours, lora)]


def is_of_linear(ours: str) -> bool:
    """Whether a tensor is the weight of a layer that may have an update, by its name."""
    return ours.endswith(".weight") and ".linear_" in f".{ours}"


def target_names(mapping: WeightMapping, config: Any) -> list[str]:
    """The names of layers that targets may have: the family's and megatron-core's."""
    found = []
    for ours, mapped in mapping.items():
        if is_of_linear(ours):
            found += [name.removesuffix(".weight") for name in (ours, *mapped.names)]
    usual = _USUAL if getattr(config, "experts", None) is None else (*_USUAL, *_OF_EXPERTS)
    if (latent := getattr(config, "latent_attention", None)) is not None:
        layers = latent.linear_layers(config.hidden_size, config.num_attention_heads)
        usual = (*(f"self_attention.{name}" for name in layers), *usual[2:])
    return found or [f"decoder.layers.0.{name}" for name in usual]


def router_names(mapping: WeightMapping, config: Any) -> list[str]:
    """The names of the routers of experts: the family's and megatron-core's."""
    experts = getattr(config, "experts", None)
    has = [] if experts is None else experts.in_layers(config.num_layers)
    ours = [f"decoder.layers.{number}.mlp.router.weight" for number, here in enumerate(has) if here]
    return [name.removesuffix(".weight") for each in ours for name in (each, *mapping.get(each, Same(each)).names)]


# Those of attention come first.
_USUAL: tuple[str, ...] = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_OF_EXPERTS = tuple(f"mlp.{kind}.linear_{name}" for kind in ("experts", "shared_experts") for name in ("fc1", "fc2"))


def key_prefix_of(ours: str) -> str:
    """The beginning of the names of the tensors that update the weight ``ours``."""
    return f"{ours.removesuffix('.weight')}{UPDATE}."


def _linears(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in chunk.named_modules():
        is_linear = isinstance(module, ColumnParallelLinear | RowParallelLinear) or _holds_experts(module)
        if is_linear and ".linear_" in f".{name}":
            yield name, module


def _holds_experts(module: torch.nn.Module) -> bool:
    """Whether it is a projection of several experts, a ``GroupedLinear``."""
    return hasattr(module, "product")


class _AddUpdate:
    """A forward hook that adds the update to a layer's output."""

    def __init__(self, adapter: Adapter | ExpertAdapter) -> None:
        self.adapter = adapter

    def __call__(self, _: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
        if isinstance(self.adapter, ExpertAdapter):
            return output + self.adapter(*inputs)
        value, bias = output
        return value + self.adapter(inputs[0]), bias


def _wants_gradient(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and output.is_leaf and not output.requires_grad:
        output.requires_grad_()
    return output
