"""What differs between the releases of megatron-core that this package runs on, 0.16.1 to 0.19, a function each.

Each asks megatron-core what it has, not for its number. The oldest release is the last one for Python 3.11.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
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


def gradients_counted_here(inner: MegatronOptimizer) -> list[torch.Tensor]:
    """The gradients that this rank adds to the norm of the whole model; the function has another name from 0.19 on."""
    former: Any = getattr(inner, "get_main_grads_for_grad_norm", None)
    return former() if former is not None else inner.get_grads_for_grad_norm()
