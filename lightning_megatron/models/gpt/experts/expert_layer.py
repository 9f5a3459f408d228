"""``ExpertLayer``: a router, the experts that it sends tokens to, and those that all tokens share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, checkpoint
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from typing_extensions import override

from lightning_megatron.distributed import process_groups
from lightning_megatron.models.gpt.experts.grouped_experts import GroupedExperts
from lightning_megatron.models.gpt.experts.one_rank_dispatch import OneRankDispatcher
from lightning_megatron.models.gpt.experts.router import ExpertRouter
from lightning_megatron.models.layers.recomputation import recomputes


class ExpertLayer(MoELayer):
    """megatron-core's layer of experts, which takes the place of a feed-forward layer.

    Args:
        config: megatron-core's configuration; its ``experts`` are the settings. In a model of your own it is made by
            ``self.transformer_config(experts=Experts(...))``.
        layer_number: Number of the layer in the model, from 1; ``TrainingMonitor`` shows it, less 1.
        **_: Arguments that megatron-core gives to layers of other kinds.
    """

    def __init__(self, config: TransformerConfig, layer_number: int = 1, **_: Any) -> None:
        linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        parts = MoESubmodules(
            router=ExpertRouter,
            experts=GroupedExperts,
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=linear),
        )
        groups = get_default_pg_collection()
        super().__init__(config, parts, pg_collection=groups)
        self.set_layer_number(layer_number)
        plain = config.moe_expert_capacity_factor is None and not config.moe_shared_expert_overlap
        if groups.tp_ep.size() == 1 and plain:
            self.token_dispatcher = OneRankDispatcher(config, groups)
        if config.moe_shared_expert_gate:
            config.init_method(self.shared_experts.gate_weight)  # noted again: megatron-core has changed its type

    @override
    def forward(
        self, hidden_states: torch.Tensor, intermediate_tensors: Any = None, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        """Run the layer on ``[s/tp, b, h]``; the output, and no bias.

        Args:
            hidden_states: Hidden states.
            intermediate_tensors: None; megatron-core has some for CUDA graphs.
            padding_mask: The weights of the tokens in the loss, ``[b, s/tp]``; megatron-core hands them on by this
                name. None: 1.
        """
        weights = None if padding_mask is None else padding_mask.t().contiguous()
        if self.training and torch.is_grad_enabled() and recomputes(self.config, "whole_mlp"):
            return checkpoint(self._run, False, hidden_states, weights), None
        return self._run(hidden_states, weights), None

    def _run(self, hidden_states: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        shared = self.shared_experts_compute(hidden_states)
        probs, chosen = self.router(hidden_states, weights)
        padding, tokens = self._lacking(len(probs)), hidden_states
        if padding:
            tokens = F.pad(hidden_states.flatten(0, 1), (0, 0, 0, padding)).unsqueeze(1)
            probs, chosen = F.pad(probs, (0, 0, 0, padding)), F.pad(chosen, (0, 0, 0, padding))
        sent, probs = self.preprocess(tokens, probs, chosen)
        received, probs = self.dispatch(sent, probs)
        output, _ = self.routed_experts_compute(received, probs)
        result: torch.Tensor = self.postprocess(self.combine(output), None)
        if padding:
            result = result.flatten(0, 1)[:-padding].view_as(hidden_states)
        return result if shared is None else result + shared

    def _lacking(self, tokens: int) -> int:
        """How many tokens fewer than another rank this one has; an all-gather takes equally many of each.

        Ranks that read the same rows have equally many, and all-to-all takes any numbers.
        """
        group = self.token_dispatcher.tp_ep_group
        gathers = isinstance(self.token_dispatcher, MoEAllGatherTokenDispatcher) and group.size() > 1
        if not gathers or process_groups.replicas().size() == 1:
            return 0
        most = torch.full((), tokens, device=self.router.weight.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        return int(most) - tokens

    def take_groups(self, groups: Any) -> None:
        """Use these process groups of megatron-core's in place of destroyed ones of the same sizes."""
        self.ep_group, self.attn_tp_group = groups.ep, groups.tp
        self.experts.take_groups(groups)
        dispatcher = self.token_dispatcher
        dispatcher.ep_group, dispatcher.tp_group, dispatcher.tp_ep_group = groups.ep, groups.expt_tp, groups.tp_ep
