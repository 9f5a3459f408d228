"""What differs between the releases of megatron-core that this package runs on, 0.16.1 to 0.19, a function each.

Each asks megatron-core what it has, not for its number. The oldest release is the last one for Python 3.11.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import (
    mappings,
    scatter_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.mlp import MLP, MLPSubmodules


def dense_mlp_submodules(layer: ModuleSpec) -> MLPSubmodules | None:
    """The linear layers in the spec of a layer; None if its feed-forward layer is not megatron-core's dense one.

    That one is a ``ModuleSpec`` up to 0.17, a partial of ``MLP.as_mlp_submodule`` from 0.18 on.
    """
    mlp = layer.submodules.mlp
    if isinstance(mlp, functools.partial):
        return mlp.keywords["submodules"] if mlp.func == MLP.as_mlp_submodule else None
    return mlp.submodules if isinstance(mlp, ModuleSpec) and mlp.module is MLP else None


def linear_function_tail(options: dict[str, Any]) -> tuple[Any, ...]:
    """What the autograd function of a parallel linear layer takes behind the tensor-parallel group.

    From 0.19 on that is the number of ranks over which the weight is cut and gathered (1 here).

    Args:
        options: The arguments that the layer gives its forward pass, by name.
    """
    return tuple(options[name] for name in ("gtp_remat_size",) if name in options)


def sum_views_too() -> None:
    """Have megatron-core's sums over ranks, of layers and of their gradients, sum tensors that are not contiguous.

    Its own (up to 0.18) sum a contiguous copy and return what they were given, without an error: a transposed output
    stays partial, and so does the gradient of a mean behind ``copy_to_tensor_model_parallel_region``.
    """
    mappings._reduce = _reduce


def take_gathered_logits() -> None:
    """Have megatron-core's language models compute the losses of logits that they gathered (``parallel_output=False``).

    Their cross-entropy takes any logits for this rank's shard of the vocabulary (0.16.1 to 0.19, Megatron-LM #7452): of
    gathered ones the loss is too large by ``log(tp)``, and the gradients are wrong. Here each rank takes its shard.
    """
    LanguageModule.compute_language_model_loss = _loss_of_shards


def mark_sinks(model: torch.nn.Module) -> None:
    """Mark the learnable offsets of softmax as divided over the tensor-parallel ranks by heads, which they are.

    megatron-core and Transformer Engine leave the mark out (0.16.1 to 0.19, Megatron-LM #7452): the heads of all ranks
    but the first are then missing from the gradient norm, and are taken for copies of the first rank's.
    """
    for name, weight in model.named_parameters():
        if name.endswith("softmax_offset") and not getattr(weight, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)


def let_routers_run() -> None:
    """Let the router of experts multiply by torch where Transformer Engine is missing.

    megatron-core (0.16.1) asks whether ``te_general_gemm`` is None, and without Transformer Engine there is no such
    name; later releases have it.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def let_latent_attention_run() -> None:
    """Let multi-latent attention be built without Transformer Engine.

    megatron-core (0.16.1) asks whether its output layer is a ``TELinear``, which then is no class.
    """
    from megatron.core.transformer import multi_latent_attention

    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.TELinear = type("TELinear", (), {})


_compute_loss = LanguageModule.compute_language_model_loss


def _loss_of_shards(self: Any, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    group = self.pg_collection.tp
    layer = getattr(self, "output_layer", None)
    if group.size() > 1 and layer is not None and logits.size(-1) == layer.output_size_per_partition * group.size():
        logits = scatter_to_tensor_model_parallel_region(logits, group=group)
    return _compute_loss(self, labels, logits)


def _reduce(input_: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    if group.size() == 1:
        return input_
    summed = input_.contiguous()
    dist.all_reduce(summed, group=group)
    return summed
