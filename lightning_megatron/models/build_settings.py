"""``BuildSettings``: the strategy's settings by which a module builds its model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch

from lightning_megatron.distributed.layout import ContextComm, ParallelLayout
from lightning_megatron.models.kernels import Kernels
from lightning_megatron.models.recompute import Recompute


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """The run's side of a model's configuration.

    Args:
        layout: The parallel sizes.
        params_dtype: Type of the weights and of what travels between pipeline stages.
        recompute: Which activations are computed again in the backward pass.
        kernels: Which implementations compute the layers and the loss, as ``Kernels.on`` the device gives them.
        cp_comm: How attention reaches across the ranks that share a sequence; None: the best for the shape.
        fp8: megatron-core's fields of fp8; none where nothing is multiplied in fp8.
        device: The device that the model is built on in any device context; models move, so it is not compared.
    """

    layout: ParallelLayout
    params_dtype: torch.dtype = torch.float32
    recompute: Recompute | None = None
    kernels: Kernels = field(default_factory=lambda: Kernels().on(torch.device("cpu")))
    cp_comm: ContextComm | None = None
    fp8: dict[str, Any] = field(default_factory=dict)
    device: torch.device = field(default=torch.device("cpu"), compare=False)

    def transformer_config_arguments(self) -> dict[str, Any]:
        """The arguments of megatron-core's ``TransformerConfig`` that follow from the run, not from the model."""
        interleaved = self.layout.vp is not None
        return {
            "tensor_model_parallel_size": self.layout.tp,
            "pipeline_model_parallel_size": self.layout.pp,
            "virtual_pipeline_model_parallel_size": self.layout.vp,
            "context_parallel_size": self.layout.cp,
            "expert_model_parallel_size": self.layout.ep,
            "expert_tensor_parallel_size": self.layout.expert_tp,
            "moe_token_dispatcher_type": self.kernels.expert_dispatch,
            "sequence_parallel": self.layout.uses_sequence_parallel,
            "params_dtype": self.params_dtype,
            "pipeline_dtype": self.params_dtype,
            "bf16": self.params_dtype == torch.bfloat16,
            "fp16": self.params_dtype == torch.float16,
            # The loss comes as a sum with its weight; the engine divides once, over the whole global batch.
            "calculate_per_token_loss": True,
            "deallocate_pipeline_outputs": True,
            # Interleaved with batched messages, pp=2 pairs them in the wrong order and trains on wrong gradients.
            "overlap_p2p_comm": interleaved,
            "batch_p2p_comm": not interleaved,
            # It stops the host at each message, for a race in torch that is mended since 1.13 (pytorch/pytorch#82450).
            "batch_p2p_sync": False,
            **self.fp8,
        }


def differences(before: Any, now: Any) -> tuple[str, str]:
    """What differs between the fields of two dataclasses of one type, as text for people: of the first, of the second.

    Fields that are not compared are left out, and fields of fields are named by themselves.
    """
    if not is_dataclass(before) or type(before) is not type(now):
        return repr(before), repr(now)
    found = []
    for each in fields(before):
        one, other = getattr(before, each.name), getattr(now, each.name)
        if each.compare and one != other:
            nested = differences(one, other)
            found.append(nested if is_dataclass(one) else tuple(f"{each.name}={text}" for text in nested))
    return ", ".join(text for text, _ in found), ", ".join(text for _, text in found)
