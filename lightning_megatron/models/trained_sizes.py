"""What is trained of a model: all of it, or low-rank updates and some parts; and what keeps its input therefore.

A frozen linear layer needs its weight for the backward pass, and its input only where an update reads it, too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.expert_sizes import (
    ends_with_experts,
    layers_with_experts,
    routed_weights,
    tokens_of_experts,
)
from lightning_megatron.models.lora.config import LoRA
from lightning_megatron.models.lora.update_sizes import linear_layers, updates_of
from lightning_megatron.models.parameter_counts import Part


class TrainedSizes:
    """What is trained of a model on a tensor-parallel rank.

    Args:
        config: The configuration of the model.
        layout: The parallel sizes.
        lora: The updates; None: everything is trained.
    """

    def __init__(self, config: Any, layout: ParallelLayout, lora: LoRA | None) -> None:
        self.config, self.layout, self.lora = config, layout, lora
        self._updates = [] if lora is None else updates_of(config, lora)
        self._parts = [] if lora is None else lora.also_train
        embedding = self.trains("embedding.word_embeddings")
        tied = getattr(config, "tie_embeddings", True)
        self.output = self.trains("output_layer") or (tied and embedding) or (not config.outputs_are_sharded)
        self.embedding = self.trains("embedding")

    def trains(self, name: str) -> bool:
        """Whether a part of the model, by megatron-core's name, is trained whole."""
        return self.lora is None or any(name == part or name.startswith(f"{part}.") for part in self._parts)

    def updates(self, stack: int, first: int, layers: int, *, of_experts: bool = False) -> int:
        """The numbers of the updates of some layers, all or those of routed experts."""
        mine = self._updates[stack][first : first + layers] if self._updates else []
        every = [update for layer in mine for update in layer.values() if update.layer.experts or not of_experts]
        return sum(update.numbers(self.layout) for update in every)

    def numbers(self, chunk: list[Part]) -> int:
        """The numbers that are trained of a chunk.

        Args:
            chunk: The layers of the chunk, each part with the number of its first.
        """
        config, layout = self.config, self.layout
        if self.lora is None:
            return int(config.parameters(layout, chunk))
        total = 0
        for part in chunk:
            total += self.updates(part.stack, part.first, part.layers)
            bare = replace(part, layers=0, embeds=False, ends_stack=False, ends_model=False)
            name, rest = config.stack_names[part.stack], config.parameters(layout, [bare])
            for number in range(part.first, part.first + part.layers):
                layer = config.parameters(layout, [replace(bare, layers=1, first=number)]) - rest
                total += self._of_layer(f"{name}.layers.{number}", layer, self._has_experts(part, number))
            if part.ends_stack and self.trains(f"{name}.final_layernorm"):
                total += config.parameters(layout, [replace(bare, ends_stack=True)]) - rest
        embeds, ends = any(part.embeds for part in chunk), any(part.ends_model for part in chunk)
        return total + self._of_ends(embeds, ends)

    def of_experts(self, part: Part) -> int:
        """The numbers that are trained of the routed experts of some layers; their copies are on other ranks."""
        found = self.updates(part.stack, part.first, part.layers, of_experts=True)
        for number in range(part.first, part.first + part.layers):
            name = f"{self.config.stack_names[part.stack]}.layers.{number}.mlp.experts"
            if self.trains(name) and self._has_experts(part, number):
                found += routed_weights(self.config, self.layout)
        if part.ends_model and self.lora is None and ends_with_experts(self.config):
            found += getattr(self.config, "mtp", 0) * routed_weights(self.config, self.layout)
        return found

    def _has_experts(self, part: Part, number: int) -> bool:
        return layers_with_experts(self.config, replace(part, layers=1, first=number)) > 0

    def _of_layer(self, name: str, layer: int, has_experts: bool) -> int:
        """The numbers of a layer that is trained whole, or of its linear layers and the router that are."""
        if self.trains(name):
            return layer
        has_bias = self.config.family_arguments().get("add_bias_linear", True)
        total = 0
        for leaf, linear in linear_layers(self.config, has_experts).items():
            if self.trains(f"{name}.{leaf}"):
                count, inputs, rows = linear.on_rank(self.layout)
                total += count * (inputs + has_bias) * rows
        if has_experts and self.trains(f"{name}.mlp.router"):
            total += self.config.experts.num * self.config.hidden_size
        return total

    def _of_ends(self, embeds: bool, ends: bool) -> int:
        config, layout = self.config, self.layout
        vocabulary = layout.padded_vocab_size(config.vocab_size, config.make_vocab_size_divisible_by) // layout.tp
        total = 0
        if embeds and self.embedding:
            total += config.embedding_parameters(layout)
        elif embeds and self.trains("embedding.word_embeddings"):
            total += vocabulary * config.hidden_size
        known = ("embedding", *config.stack_names)
        heads = [part for part in self._parts if part.partition(".")[0] not in known]
        if ends and (heads or (self.output and config.outputs_are_sharded)):
            total += config.head_parameters(layout, embeds)
        return int(total)

    def keeps_input(self, stack: int, leaf: str) -> float:
        """In which share of a stack's layers a linear layer, or its update, keeps the layer's input as it is."""
        if self.lora is None:
            return 1.0
        layers, name = self._updates[stack], self.config.stack_names[stack]
        if leaf.startswith("mlp."):  # that of experts is what a layer has in its place
            names = [next((each for each in layer if each.endswith(leaf[4:])), leaf) for layer in layers]
        else:
            names = [leaf] * len(layers)
        undropped = not self.lora.dropout
        keep = [
            (names[n] in layers[n] and undropped) or self.trains(f"{name}.layers.{n}.{names[n]}")
            for n in range(len(layers))
        ]
        return sum(keep) / max(len(keep), 1)

    def kept(self, stack: int, kind: str, tokens: float, keys: float) -> tuple[float, float, float]:
        """What the updates of a layer keep, on average over the stack's layers of its kind.

        Args:
            stack: Index of the stack.
            kind: The beginning of the linear layers' names.
            tokens: Tokens of a micro-batch.
            keys: Those that cross-attention looks at.

        Returns:
            Numbers that are made of each token: the products with ``A``, and with dropout the inputs that are left;
            numbers of the copies of ``A`` and ``B``; and numbers of what dropout multiplies by.
        """
        made, copies, dropped = 0.0, 0.0, 0.0
        if self.lora is None:
            return made, copies, dropped
        tp, shared = self.layout.tp, self.layout.tp if self.layout.uses_sequence_parallel else 1
        of_experts = tokens_of_experts(self.config, self.layout, tokens / shared) if "experts" in kind else 0.0
        for layer in self._updates[stack]:
            for leaf, update in layer.items():
                if not leaf.startswith(kind):
                    continue
                linear, whole = update.layer, keys if leaf.endswith("linear_kv") else tokens
                if linear.experts:  # whose tokens are with them, however they were divided
                    made += of_experts * update.rank
                    dropped += of_experts * update.layer.on_rank(self.layout)[1] if self.lora.dropout else 0.0
                    continue
                made += whole * len(update.parts) * update.rank / (1 if linear.is_column else shared)
                copies += update.copies(self.layout)
                if self.lora.dropout:
                    dropped += whole * linear.inputs / (shared if linear.is_column else tp)
        layers = self._layers_of_kind(stack, kind)
        return (made + dropped) / layers, copies / layers, dropped / layers

    def _layers_of_kind(self, stack: int, kind: str) -> int:
        """The layers of a stack that can have such linear layers, at least 1."""
        layers = len(self._updates[stack])
        with_experts = layers_with_experts(self.config, Part(stack, layers))
        if "experts" in kind:
            return max(with_experts, 1)
        return max(layers - with_experts if kind.startswith("mlp") else layers, 1)
