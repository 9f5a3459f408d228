"""Counts the bytes of activations that the backward pass needs of a layer, and of the loss, for one micro-batch.

Tensor by tensor, as Korthikanti and others count them (arXiv 2205.05198, section 4), for layers whose attention keeps
no scores, which that paper does not know. Where the layers here keep other tensors than the paper's (the input of an
activation and its output, but no copy of attention's output), the formulas follow the layers; tests hold them against
the tensors that torch saves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models import expert_sizes, latent_memory
from lightning_megatron.models.context_parallel_memory import held_at_once, kept_beside, share
from lightning_megatron.models.kernels import Kernels
from lightning_megatron.models.layers.chunked_cross_entropy import LONGEST_CHUNK
from lightning_megatron.models.layers.context_parallel import ways
from lightning_megatron.models.memory_settings import Training
from lightning_megatron.models.parameter_counts import Part
from lightning_megatron.models.trained_sizes import TrainedSizes


class ActivationMemory:
    """Bytes that the backward pass needs of a layer and one micro-batch; n, g, d: heads, groups and a head's size."""

    def __init__(
        self, config: Any, layout: ParallelLayout, training: Training, modules: list[str], scores: tuple[bool, bool]
    ) -> None:
        self.config, self.training, self.modules, self.scores = config, training, modules, scores
        self.layout, self.element, self.tp = layout, training.element, layout.tp
        self.shared = layout.tp if layout.uses_sequence_parallel else 1  # ranks that share the tokens between blocks
        self.padded_vocab = layout.padded_vocab_size(config.vocab_size, config.make_vocab_size_divisible_by)
        self.piped = layout.pp > 1
        self.cp, stacks = layout.cp, config.stacks(training.lengths or config.lengths)
        self.stacks = (
            [share(stack, layout.cp, 2 * layout.cp * self.shared) for stack in stacks] if self.cp > 1 else stacks
        )
        self.settings = config.family_arguments()
        self.kernels = training.kernels or Kernels()
        self.fused = self.kernels.fused_layers is True
        self.joins_norms = self.fused and "layernorm" not in modules  # with the sums before them
        self.heads = config.num_attention_heads / layout.tp
        self.groups = config.sizes()["num_query_groups"] / layout.tp
        self.way = ways.chosen(
            training.cp_comm,
            cp=self.cp,
            tp=layout.tp,
            heads=config.num_attention_heads,
            groups=config.sizes()["num_query_groups"],
        )
        self.latent = getattr(config, "latent_attention", None)
        size = config.kv_channels or config.hidden_size // config.num_attention_heads
        self.size = size if self.latent is None else self.latent.qk_head_dim
        self.trained = TrainedSizes(config, layout, training.lora)

    def hidden(self, stack: int | None = None) -> float:
        """One hidden state ``[s/(cp·tp), b, h]`` of a stack; of all of them, what travels between stages."""
        tokens = sum(each.tokens for each in self.stacks) if stack is None else self.stacks[stack].tokens
        return self._tokens(tokens) * self.config.hidden_size * self.element

    def kept(self, part: Part) -> float:
        """All that a chunk keeps of one micro-batch, but for the logits."""
        whole = self._whole_layers(part)
        total = whole * self.hidden(part.stack) + self._layers(part, whole) + self._behind(part)
        if self.piped and part.stack and whole < part.layers:  # what the encoder has sent
            total += self.hidden(part.stack - 1) * self.trained.keeps_input(part.stack, "cross_attention.linear_kv")
        if part.embeds:
            embedding = self._mask(part.stack) if self.config.hidden_dropout else 0.0
            embedding += 0.0 if self.config.final_norms else self._norm(part.stack, recomputed=False)
            total += embedding if self.trained.embedding else 0.0
        return total

    def _behind(self, part: Part) -> float:
        """What is kept behind the layers: of the final norm, and of a head before its output layer."""
        output = float(self.trained.output)  # whose input is kept to train it
        if part.stack + 1 < len(self.stacks):  # of an encoder, the decoder's layers, which may be on another stage
            output = 0.0 if self.piped else self.trained.keeps_input(part.stack + 1, "cross_attention.linear_kv")
        total = self.config.final_norms * self._norm(part.stack, False, output) if part.ends_stack else 0.0
        if part.ends_model:
            total += self.config.head_activations(self.hidden(part.stack))
            total += getattr(self.config, "mtp", 0) * self._later_tokens(part.stack, output)
            if not self.config.final_norms and "layernorm" in self.modules:
                total += self.hidden(part.stack)  # the output of the last layer's norm, which leaves the stack
        return total

    def _later_tokens(self, stack: int, output: float, again: bool = False) -> float:
        """One depth of multi-token prediction: two norms, their outputs side by side, a layer and the norm behind it.

        Args:
            stack: Index of the stack.
            output: Whether the output layer keeps its input.
            again: Whether this is what is computed again, of a depth that is recomputed whole.
        """
        inputs = 2 * self.hidden(stack)  # hidden states and embeddings
        if self._recomputes_layers and not again:
            return inputs + output * self.hidden(stack)
        inside = (
            2 * self._norm(stack, False, 0.0) + inputs + self.layer(stack, expert_sizes.ends_with_experts(self.config))
        )
        return inside + self._norm(stack, False, output) - inputs * again

    def recomputed_at_once(self, part: Part, logits: float) -> float:
        """What the backward pass of a recomputed layer holds beyond what the layers behind it and the loss have freed.

        Args:
            part: The layers of a chunk.
            logits: Bytes of the loss, which are free by then.
        """
        recompute, whole = self.training.recompute, self._whole_layers(part)
        if not part.layers:
            return 0.0
        stack, later = self.stacks[part.stack], getattr(self.config, "mtp", 0) if part.ends_model else 0
        freed = self._behind(part) + (logits if part.ends_model else 0.0)
        if whole:
            again = max(self.layer(part.stack, has) for has in self._kinds(part)) - self.hidden(part.stack)
            of_model = again - self._layers(part, whole) - freed
            if not later:
                return of_model
            return max(of_model, self._later_tokens(part.stack, 0.0, again=True) - logits / (1 + later))
        again = 0.0
        if recompute is not None and "mlp" in self.modules:
            again = max(self._feed_forward(part.stack, has, recomputed=False) for has in self._kinds(part))
        elif recompute is not None and "mlp_act" in self.modules and True in self._kinds(part):
            tokens = self._tokens(stack.tokens)
            again = expert_sizes.output_bytes(self.config, self.layout, tokens, self.element)
        if recompute is not None and "core_attn" in self.modules:
            kinds = range(len(stack.attention))
            most = max(self._attention(part.stack, n, False) - self._attention(part.stack, n) for n in kinds)
            less = min(self._feed_forward(part.stack, has) for has in self._kinds(part))
            again = max(again, most - less - self._norm(part.stack, recomputed=True))
        return again - freed

    @property
    def _recomputes_layers(self) -> bool:
        """Whether layers are recomputed whole, all or some of the model, and so those of multi-token prediction."""
        return self.training.recompute == "full" or isinstance(self.training.recompute, int)

    def _whole_layers(self, part: Part) -> int:
        """The layers of a chunk that are recomputed whole."""
        recompute = self.training.recompute
        if recompute == "full":
            return part.layers
        return min(recompute, part.layers) if isinstance(recompute, int) else 0

    def _layers(self, part: Part, whole: int) -> float:
        """The layers of a chunk behind those that are recomputed whole, which come first."""
        rest = replace(part, first=part.first + whole, layers=part.layers - whole)
        with_experts = expert_sizes.layers_with_experts(self.config, rest)
        total = with_experts * self.layer(part.stack, True) if with_experts else 0.0
        return total + (rest.layers - with_experts) * self.layer(part.stack, False)

    def _kinds(self, part: Part) -> set[bool]:
        """Whether layers of a chunk have experts: of some, both."""
        with_experts = expert_sizes.layers_with_experts(self.config, part)
        return {has for has, number in ((True, with_experts), (False, part.layers - with_experts)) if number}

    def layer(self, index: int, has_experts: bool) -> float:
        """One layer of a stack: attention, feed-forward layer, and a norm before (or behind, or both) each."""
        stack = self.stacks[index]
        placement = getattr(self.config, "norm_placement", "pre")
        recomputed = "layernorm" in self.modules and placement != "output"
        total = 2 * self._norm(index, False, 0.0) if placement == "sandwich" else 0.0
        for number in range(len(stack.attention)):
            output = self._keeps_input_of_attention(index, number)
            total += self._norm(index, recomputed, output) + self._attention(index, number)
            total += self._mask(index) if self.config.hidden_dropout else 0.0
        output = self.trained.keeps_input(index, "mlp.linear_fc1")
        shared = getattr(self.config, "shared_norm", False)
        total += (0.0 if shared else self._norm(index, recomputed, output)) + self._feed_forward(index, has_experts)
        return total + (self._mask(index) if self.config.hidden_dropout else 0.0)

    def _keeps_input_of_attention(self, index: int, number: int) -> float:
        if self.latent is None:
            return self.trained.keeps_input(index, ("self_attention.linear_qkv", "cross_attention.linear_q")[number])
        of_queries = "linear_q_proj" if self.latent.q_lora_rank is None else "linear_q_down_proj"
        names = (of_queries, "linear_kv_down_proj")
        return max(self.trained.keeps_input(index, f"self_attention.{name}") for name in names)

    def logits(self) -> tuple[float, float]:
        """What the loss keeps, and what it takes beside that while it is computed.

        The softmax in fp32 ``[s, b, vocab/tp]``, and the logits in the weights' type; of a loss in chunks, what
        ``_chunked_loss`` says.
        """
        tokens = self.stacks[-1].tokens * self.training.micro_batch_size
        width = self.config.outputs(self.padded_vocab) / (self.tp if self.config.outputs_are_sharded else 1)
        counted = tokens * self.config.share_of_counted_tokens
        if self.kernels.chunked_loss is True and self.config.outputs_are_sharded:
            return self._chunked_loss(tokens, counted, width)
        copy = tokens * width * self.element if self.element < 4 or counted < tokens else 0.0
        return counted * width * 4, copy

    def _chunked_loss(self, tokens: float, counted: float, width: float) -> tuple[float, float]:
        """The gradients of hidden states and output weight, computed beside the loss; and a chunk's logits.

        Each chunk's gradient is in the place of its logits. Where nothing joins the operations on them, there are an
        fp32 copy of logits in another type, and their exponentials. In fp16 the backward pass computes the gradients.

        Args:
            tokens: Tokens of a micro-batch.
            counted: Those whose losses count, to which the CPU restricts the logits.
            width: Columns of the logits on a rank.
        """
        device, element, hidden = self.training.device, self.element, self.config.hidden_size
        rows = counted if device == "cpu" else tokens
        number = rows / -(-rows // LONGEST_CHUNK[device])  # of tokens in a chunk
        logits = number * width * (element if self.fused else 4 + (4 if element < 4 else 0) + element)
        summed = width * hidden * 4 if self.trained.output else 0.0
        if self.training.precision == "16-mixed":
            return 0.0, logits + rows * hidden * element + summed
        in_buffer = self.kernels.fused_weight_gradients is True and (
            device == "cuda" or self.training.precision in ("32-true", "bf16-true")
        )
        scaled = 0.0 if in_buffer else summed * (1 + (element / 4 if element < 4 else 0))
        return rows * hidden * element + summed, max(logits, scaled)

    def _norm(self, stack: int, recomputed: bool, output: float = 1.0) -> float:
        """Its input and its output, which the linear layer behind it keeps; fp32 statistics of each token.

        torch has no RMSNorm of one piece on a CPU: it keeps the input in fp32, and the normalised one for its weight.

        Args:
            stack: Index of the stack.
            recomputed: Whether the output is computed again.
            output: The share of layers in which something keeps the output.
        """
        hidden, tokens = self.hidden(stack), self._tokens(self.stacks[stack].tokens)
        if self.settings.get("normalization", "LayerNorm") == "LayerNorm":
            kept = hidden + 8 * tokens
        elif self.training.device == "cuda" or self.joins_norms:
            kept = hidden + 4 * tokens
        else:
            wide = tokens * self.config.hidden_size * 4
            kept = (2 if self.training.lora is None else 1) * wide + 4 * tokens
        return kept if recomputed else kept + output * hidden

    def _attention(self, index: int, number: int, recomputed: bool = True) -> float:
        """Queries, keys and values, the output, and the sums of the softmax; and what updates of the layers keep.

        Rotated queries and keys are kept beside the projection's output, of which the values are a part.
        """
        stack, kind = self.stacks[index], ("self_attention", "cross_attention")[number]
        rows, element, tokens, keys = (
            self.training.micro_batch_size,
            self.element,
            stack.tokens,
            stack.attention[number][0],
        )
        output = self.trained.keeps_input(index, f"{kind}.linear_proj")
        updates = self._updates(index, f"{kind}.")
        query, key = self._queries_and_keys(index, number)
        if self.latent is not None:
            updates += self._latents(tokens * rows, output)
            scores = self.scores[number] and not (recomputed and "core_attn" in self.modules)
            beside = self._scores(tokens, keys, query, key, number) if scores else 4 * tokens * rows * self.heads
            return updates + beside
        total = query + 2 * key
        rotated = getattr(self.config, "position_embedding", None) == "rope" and not self.fused
        if self.config.extra.get("qk_layernorm"):
            updates += self._normed_heads(query + key)
        if recomputed and "core_attn" in self.modules:
            return updates + (total + rotated * (query + key) + output * query) * element
        total += kept_beside(self.way if self.cp > 1 else None, query, key, rotated)
        if not self.scores[number]:
            return updates + (total + query) * element + 4 * tokens * rows * self.heads
        return updates + output * query * element + self._scores(tokens, keys, query, key, number)

    def _latents(self, tokens: float, output: float) -> float:
        """What multi-latent attention keeps, but for the sums of the softmax."""
        way = self.way if self.cp > 1 else None
        numbers = latent_memory.kept(self.latent, tokens, self.heads, self.training.device, way, self.modules, output)
        in_pieces = 0
        if self.training.device == "cpu" and self.settings.get("normalization", "LayerNorm") == "RMSNorm":
            in_pieces = 2 if self.training.lora is None else 1  # as in _norm
        return numbers * self.element + latent_memory.kept_by_norms(
            self.latent, tokens / self.shared, self.element, in_pieces
        )

    def _scores(self, tokens: int, keys: int, query: float, key: float, number: int) -> float:
        """What attention keeps of a layer whose scores are kept, but for its output.

        Scaled queries and keys and the values, all in fp32; the projection's output only where the values are a part
        of it. An all-to-all has given a rank the keys of a part of the heads; an all-gather keeps what it sends again.
        Each layer makes T5's bias anew of the numbers of the distances that there are, of 8 bytes each.

        Args:
            tokens: Queries of a row.
            keys: Keys of a row.
            query: Numbers of a rank's queries.
            key: Numbers of a rank's own keys.
            number: 0 for self-attention, 1 for cross attention, which has no bias.
        """
        by_heads = self.cp > 1 and self.way == "all_to_all"
        seen = keys * self.training.micro_batch_size * self.heads
        repeated = seen * self.size / (self.cp if by_heads else 1)
        copied = self.element < 4 or self.groups < self.heads
        values = repeated if copied else (key if by_heads else 0.0)
        beside = 0.0
        if self.cp > 1 and not by_heads:
            beside = 2 * key * self.element
        elif not copied and self.cp == 1:  # the values are a part of it
            beside = (query + 2 * key) * self.element
        matrices = (3 if self.config.attention_dropout else 1) * tokens * seen
        biased = number == 0 and getattr(self.config, "position_embedding", None) == "relative"
        distances = tokens * (self.cp if by_heads else 1) + keys if biased else 0
        return 4 * (query + repeated + values + matrices) + beside + 8 * distances

    def _queries_and_keys(self, index: int, number: int) -> tuple[float, float]:
        """Numbers of a rank's own queries, and of its own keys, in an attention of a stack's layers."""
        stack, each = self.stacks[index], self.training.micro_batch_size * self.size
        return stack.tokens * each * self.heads, stack.attention[number][0] / self.cp * each * self.groups

    def from_other_ranks(self) -> float:
        """What attention holds at once of the ranks that share a sequence."""
        if self.cp == 1:
            return 0.0
        kinds = [(index, number) for index, stack in enumerate(self.stacks) for number in range(len(stack.attention))]
        return self.element * max(held_at_once(self.way, self.cp, *self._queries_and_keys(*kind)) for kind in kinds)

    def _normed_heads(self, numbers: float) -> float:
        """What norms of queries and keys keep, as ``_norm``; their outputs are rotated, and not kept."""
        plain = self.settings.get("normalization", "LayerNorm") == "LayerNorm" or self.training.device == "cuda"
        return numbers * (self.element if plain else 8)

    def _feed_forward(self, index: int, has_experts: bool, recomputed: bool = True) -> float:
        """The activation's input, which is twice as wide where it is gated, and its output ``[s, b, ffn/tp]``.

        A gate also keeps the activated half, and the other one as a copy, to which megatron-core adds an offset of 0.
        ReLU keeps its output alone.
        """
        if recomputed and "mlp" in self.modules:
            return 0.0
        if has_experts:
            again = recomputed and "mlp_act" in self.modules
            tokens = self._tokens(self.stacks[index].tokens)
            updates = self._updates(index, "mlp.experts.") + self._updates(index, "mlp.shared_experts.")
            return updates + expert_sizes.kept_bytes(
                self.config, self.layout, tokens, self.element, recomputes_activation=again
            )
        one = self.stacks[index].tokens * self.training.micro_batch_size * self.element * self._width / self.tp
        inputs = 2 if self.config.is_gated else 1
        output, updates = self.trained.keeps_input(index, "mlp.linear_fc2"), self._updates(index, "mlp.linear_")
        if recomputed and "mlp_act" in self.modules:
            return updates + inputs * one
        if self.fused:
            return updates + (inputs + output) * one
        if self.config.activation == "relu":
            return updates + one
        return updates + (inputs + (2 if self.config.is_gated else 0) + output) * one

    def _updates(self, index: int, kind: str) -> float:
        """What the low-rank updates of a layer keep, of linear layers whose names begin with ``kind``."""
        stack, rows, element = self.stacks[index], self.training.micro_batch_size, self.element
        numbers, copies, masks = self.trained.kept(
            index, kind, stack.tokens * rows, stack.attention[-1][0] / self.cp * rows
        )
        mask = element if self.training.device == "cpu" else 1
        return (numbers + copies) * element + masks * mask

    @property
    def _width(self) -> int:
        return self.config.ffn_hidden_size or 4 * self.config.hidden_size

    def _mask(self, stack: int) -> float:
        """What dropout drops: a byte for each number on a GPU, and a number on a CPU."""
        fused = self.fused if self.config.final_norms else self.joins_norms
        return self.hidden(stack) / (1 if self.training.device == "cpu" and not fused else self.element)

    def _tokens(self, tokens: int) -> float:
        """Tokens of a micro-batch that a rank has between the tensor-parallel blocks."""
        return tokens * self.training.micro_batch_size / self.shared
