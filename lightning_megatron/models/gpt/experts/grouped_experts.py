"""``GroupedExperts``: the experts of a rank, their weights in one tensor for each of the two projections."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from lightning_megatron.models.layers.recomputation import activated, recomputes
from lightning_megatron.training.weight_gradients import add_product, takes_product

_ALIGNED = 16  # bytes; torch's grouped product takes rows that begin there


class GroupedExperts(MegatronModule):
    """Feed-forward layers, each for its own tokens, which come sorted by expert.

    Args:
        num_local_experts: The experts of this rank.
        config: megatron-core's configuration.
        pg_collection: megatron-core's process groups: experts are divided over ``ep``, each of them over ``expt_tp``.
        **_: What later releases of megatron-core give beside these: a name.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection: Any, **_: Any) -> None:
        super().__init__(config)
        width = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        first = 2 * width if config.gated_linear_unit else width
        self.linear_fc1 = GroupedLinear(num_local_experts, config.hidden_size, first, 1, config, pg_collection)
        self.linear_fc2 = GroupedLinear(num_local_experts, width, config.hidden_size, 2, config, pg_collection)

    def forward(self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, weights: torch.Tensor) -> Any:
        """Run each expert on its tokens.

        Args:
            tokens: ``[tokens, h]``, those of the first expert first.
            tokens_per_expert: How many each has, on the host or the device.
            weights: ``[tokens]``, the router's, by which the outputs are multiplied.

        Returns:
            ``[tokens, h]``, of a divided expert its part of the sum; and no bias.
        """
        inner = self.linear_fc1(tokens, tokens_per_expert)
        if self.linear_fc1.bias is not None:
            inner = inner + self.linear_fc1.biases(tokens_per_expert, len(tokens))
        if self.training and torch.is_grad_enabled() and recomputes(self.config, "mlp_act"):
            activation = CheckpointWithoutOutput(fp8=None)
            output = self.linear_fc2(activation.checkpoint(self._activate, inner, weights), tokens_per_expert)
            activation.discard_output_and_register_recompute(output)
        else:
            output = self.linear_fc2(self._activate(inner, weights), tokens_per_expert)
        if self.linear_fc2.bias is not None:
            biases = self.linear_fc2.biases(tokens_per_expert, len(tokens))
            output = output + (biases * weights.unsqueeze(-1)).to(output.dtype)
        return output, None

    def _activate(self, inner: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The activation; what an expert gives is linear in it, so that the weight is multiplied here."""
        if joins_weights(self.config):
            return _WeightedSwiGLU.apply(inner, weights)  # type: ignore[no-untyped-call]
        return (activated(self.config, inner) * weights.unsqueeze(-1)).to(inner.dtype)

    def take_groups(self, pg_collection: Any) -> None:
        """Use these process groups in place of others of the same sizes."""
        for linear in (self.linear_fc1, self.linear_fc2):
            linear.groups = pg_collection

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's description of the weights; checkpoints ask for it."""
        found: dict[str, Any] = {}
        for name, part in self.named_children():  # the projections, and low-rank updates beside them
            found |= part.sharded_state_dict(f"{prefix}{name}.")
        return found


class GroupedLinear(torch.nn.Module):
    """One projection of all experts of a rank; ``weight`` is ``[experts, out, in]``, ``bias`` ``[experts, out]``.

    Args:
        experts: The experts of this rank.
        inputs: Width of the input on this rank.
        outputs: Width of the output on this rank.
        divided: Which dimension of the weight the expert-tensor-parallel ranks divide.
        config: megatron-core's configuration.
        groups: megatron-core's process groups.
    """

    def __init__(
        self, experts: int, inputs: int, outputs: int, divided: int, config: TransformerConfig, groups: Any
    ) -> None:
        super().__init__()
        self.groups, self.divided = groups, divided
        self.blocks = 2 if divided == 1 and config.gated_linear_unit else 1  # a gate, and what it gates
        self.adds_products = False  # set by training/weight_gradients.py
        device = torch.get_default_device()
        weight = torch.empty(experts, outputs, inputs, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        method = config.init_method if divided == 1 else config.output_layer_init_method
        if config.perform_initialization:
            method(self.weight)
        self.mark(self.weight, divided)
        self.bias: torch.nn.Parameter | None = None
        if config.add_bias_linear:  # megatron-core divides no expert that has biases
            self.bias = torch.nn.Parameter(torch.zeros(experts, outputs, dtype=config.params_dtype, device=device))
            self.mark(self.bias, None)
            self.bias.is_expert_bias = True  # type: ignore[attr-defined]  # no matrix, though it has two dimensions

    def forward(self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
        """``[tokens, out]`` of ``[tokens, in]``."""
        return self.product(tokens, self.weight, tokens_per_expert)

    def biases(self, tokens_per_expert: torch.Tensor, tokens: int) -> torch.Tensor:
        """The bias of each token's expert, ``[tokens, out]``."""
        assert self.bias is not None
        counts = tokens_per_expert.to(self.bias.device, torch.int64)
        return self.bias.repeat_interleave(counts, dim=0, output_size=tokens)

    def product(
        self, tokens: torch.Tensor, weight: torch.nn.Parameter, tokens_per_expert: torch.Tensor
    ) -> torch.Tensor:
        """``[tokens, out]`` of ``[tokens, in]`` and each expert's matrix in ``weight``, ``[experts, out, in]``."""
        if _has_grouped_product(tokens, weight):
            ends = tokens_per_expert.to(tokens.device, torch.int32).cumsum(0, dtype=torch.int32)
            return _GroupedProduct.apply(tokens, weight, ends)  # type: ignore[no-untyped-call]
        adds = self.adds_products and takes_product(weight)
        return _ProductsInTurn.apply(tokens, weight, tokens_per_expert.tolist(), adds)  # type: ignore[no-untyped-call]

    def mark(self, weight: torch.nn.Parameter, dim: int | None) -> None:
        """Mark a weight of each expert, whose gradient is summed over other ranks than a dense layer's.

        megatron-core reads the marks: without ``allreduce``, gradients are summed over the expert-data-parallel ranks.
        That is right wherever these are not the data-parallel ranks; megatron-core's own layers mark it where ep > 1
        only. ``seen_in_parts`` is read by ``training/expert_gradients.py``.

        Args:
            weight: ``[experts, ...]``.
            dim: The dimension that expert-tensor-parallel ranks divide. None: they all hold it whole, and each computes
                a part of its gradient.
        """
        groups = self.groups
        others = groups.ep.size() > 1 or groups.expt_tp.size() != groups.tp.size()
        divides = groups.expt_tp.size() > 1
        weight.allreduce = not others  # type: ignore[attr-defined]
        weight.tensor_model_parallel = divides and dim is not None  # type: ignore[attr-defined]
        weight.partition_dim, weight.partition_stride = -1 if dim is None else dim, 1  # type: ignore[attr-defined]
        weight.seen_in_parts = divides and dim is None  # type: ignore[attr-defined]

    def sharded_state_dict(self, prefix: str = "", *_: Any) -> dict[str, Any]:
        """megatron-core's description of weight and bias."""
        found: dict[str, Any] = {f"{prefix}weight": self.shard(f"{prefix}weight", self.weight, self.divided)}
        if self.bias is not None:
            found[f"{prefix}bias"] = self.shard(f"{prefix}bias", self.bias, None)
        return found

    def shard(self, key: str, weight: torch.nn.Parameter, dim: int | None) -> ShardedTensor | ShardedTensorFactory:
        """megatron-core's description of ``weight``, ``[experts, ...]``, which is divided as ``mark`` was told."""
        groups = self.groups
        experts = (0, groups.ep.rank(), groups.ep.size())
        parts, rank = groups.expt_tp.size(), groups.expt_tp.rank()
        if dim is None:
            return ShardedTensor.from_rank_offsets(key, weight, experts, replica_id=(0, rank, groups.expt_dp.rank()))
        count = self.blocks
        replica = (0, 0, groups.expt_dp.rank())

        def build(key: str, tensor: torch.Tensor, replica_id: Any, _: Any) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key, part, experts, (dim, block * parts + rank, count * parts), replica_id=replica_id
                )
                for block, part in enumerate(tensor.chunk(count, dim))
            ]

        if count == 1:
            return build(key, weight, replica, None)[0]
        return ShardedTensorFactory(key, weight, build, lambda parts: torch.cat(parts, dim), replica)


def _has_grouped_product(tokens: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch's product of all experts at once is the fast one here: of bf16 on a GPU, in aligned rows."""
    return tokens.is_cuda and tokens.dtype == torch.bfloat16 and can_group(weight)


def can_group(weight: torch.Tensor) -> bool:
    """Whether the rows of a weight, and of its transpose, begin where torch's grouped product wants them."""
    return all(size * weight.element_size() % _ALIGNED == 0 for size in weight.shape[1:])


class _GroupedProduct(torch.autograd.Function):
    """``torch._grouped_mm``, private in torch (2.13); the host need not know how many tokens an expert has."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.nn.Parameter, ends: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens, weight, ends)
        return torch._grouped_mm(tokens, weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        tokens, weight, ends = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_tokens = torch._grouped_mm(gradient, weight, offs=ends) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = torch._grouped_mm(gradient.t(), tokens, offs=ends)
        return of_tokens, of_weight, None


class _ProductsInTurn(torch.autograd.Function):
    """A product for each expert, written into one tensor; gradients are added to the buffers where they may be."""

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, weight: torch.nn.Parameter, sizes: list[int], adds: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.sizes, ctx.adds, ctx.weight = sizes, adds, weight
        output = tokens.new_empty(tokens.size(0), weight.size(1))
        for expert, start, end in _parts(sizes):
            torch.mm(tokens[start:end], weight[expert].t(), out=output[start:end])
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        tokens, weight = ctx.saved_tensors
        of_tokens = torch.empty_like(tokens) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] and not ctx.adds else None
        for expert, start, end in _parts(ctx.sizes):
            part = gradient[start:end]
            if of_tokens is not None:
                torch.mm(part, weight[expert], out=of_tokens[start:end])
            if ctx.adds:
                add_product(tokens[start:end], part, ctx.weight.main_grad[expert])
            elif of_weight is not None:
                torch.mm(part.t(), tokens[start:end], out=of_weight[expert])
        return of_tokens, of_weight, None, None


def joins_weights(config: TransformerConfig) -> bool:
    """Whether activation and weights are one operation: of SwiGLU as it is."""
    usual = config.activation_func_clamp_value is None and not config.glu_linear_offset
    return config.gated_linear_unit and config.activation_func is F.silu and usual


class _WeightedSwiGLU(torch.autograd.Function):
    """``silu(gate) · linear · weight``; it keeps its inputs alone, and the gradients of both halves are one tensor."""

    @staticmethod
    def forward(ctx: Any, inner: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inner, weights)
        gate, linear = inner.chunk(2, -1)
        return F.silu(gate).mul_(linear).mul_(weights.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        inner, weights = ctx.saved_tensors
        gate, linear = inner.chunk(2, -1)
        activated = F.silu(gate)
        weighted = (gradient * weights.unsqueeze(-1)).to(inner.dtype)
        of_inner = torch.empty_like(inner)
        of_gate, of_linear = of_inner.chunk(2, -1)
        torch.mul(weighted, activated, out=of_linear)
        torch.ops.aten.silu_backward.grad_input(weighted.mul_(linear), gate, grad_input=of_gate)
        of_weights = None
        if ctx.needs_input_grad[1]:
            of_weights = (activated.mul_(linear).to(weights.dtype) * gradient).sum(-1)
        return of_inner, of_weights


def _parts(sizes: list[int]) -> list[tuple[int, int, int]]:
    """The number of each expert that has tokens, where they begin, and where they end."""
    ends = list(accumulate(sizes))
    return [(expert, end - size, end) for expert, (size, end) in enumerate(zip(sizes, ends, strict=True)) if size]
