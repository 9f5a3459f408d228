"""``ExpertRouter``: chooses the experts of each token, and adds the losses that keep the experts equally busy."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from typing_extensions import override

from lightning_megatron.distributed.megatron_versions import let_routers_run
from lightning_megatron.models.gpt.experts.config import Experts
from lightning_megatron.models.gpt.experts.group_choice import choose_in_groups

let_routers_run()
_TINY = torch.finfo(torch.float32).tiny
# What ``seen`` adds up: weights of tokens, their losses and entropy by these weights; choices, and those dropped.
SEEN = ("weight", "aux_loss", "z_loss", "entropy", "choices", "dropped")


class ExpertRouter(TopKRouter):
    """megatron-core's router, with losses that are weighed by tokens.

    megatron-core's own losses are means over a micro-batch times its number of tokens, those without a loss included.
    Here a token's loss is multiplied by the weight that the token has in the loss of the text, and added up.

    Args:
        config: megatron-core's configuration; its ``experts`` are the settings.
        pg_collection: megatron-core's process groups.
        **_: What later releases of megatron-core give beside these: its losses, which are not used, ask for it.

    Attributes:
        watched: Whether ``seen`` is added up; a callback that shows it sets it.
        last_seen: What was seen in the last window, over all ranks: the weighed choices of each expert, then ``SEEN``.
    """

    experts: Experts
    watched = False

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.experts = config.experts
        for weight in (self.weight, self.bias):
            if weight is not None:
                config.init_method(weight)  # noted again: megatron-core has changed its type
        device = self.weight.device
        del self.expert_bias
        self.expert_bias: torch.Tensor | None = None
        if self.experts.balancing == "bias":
            del self.expert_bias
            self.register_buffer("expert_bias", torch.zeros(self.num_experts, device=device))
        if self.experts.balancing == "global_aux":
            self.register_buffer("last_shares", torch.full((self.num_experts,), 1 / self.num_experts, device=device))
        self._counts: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None
        self.last_seen: torch.Tensor | None = None

    @override
    def forward(self, input: torch.Tensor, token_weights: torch.Tensor | None = None) -> Any:
        """Choose experts for ``[s/tp, b, h]``.

        Args:
            input: Hidden states.
            token_weights: ``[s/tp, b]``, the weight of each token in the loss of the text. None: 1.

        Returns:
            The weights of the experts ``[tokens, experts]``, 0 for those that a token does not use; and which it uses.
        """
        for name in ("expert_bias", "last_shares"):
            buffer = getattr(self, name, None)
            if buffer is not None and buffer.dtype != torch.float32:  # the model's type was changed
                buffer.data = buffer.data.float()
        logits = self.gating(self.apply_input_jitter(input))
        if self.config.moe_router_force_load_balancing:
            logits = moe_utils.apply_random_logits(logits)
        return self.routing(logits, token_weights)

    @override
    def routing(self, logits: torch.Tensor, token_weights: torch.Tensor | None = None) -> Any:
        """As ``forward``, from the logits ``[s/tp, b, experts]``."""
        config, flat = self.config, logits.view(-1, self.num_experts)
        if self.experts.groups is not None:
            probs, chosen = choose_in_groups(flat, self.experts, self.expert_bias)
        else:
            probs, chosen = moe_utils.topk_routing_with_score_function(
                flat,
                self.topk,
                use_pre_softmax=config.moe_router_pre_softmax,
                scaling_factor=config.moe_router_topk_scaling_factor,
                score_function=self.score_function,
                expert_bias=self.expert_bias,
            )
        kept = chosen
        experts = self.experts
        factor = experts.capacity_factor if self.training else experts.eval_capacity_factor
        if factor is not None:
            probs, kept = moe_utils.apply_router_token_dropping(
                probs,
                chosen,
                router_topk=self.topk,
                capacity_factor=factor,
                drop_policy=config.moe_token_drop_policy,
            )
        if self.training and torch.is_grad_enabled():  # under recomputation, in the second pass only
            if token_weights is None:
                token_weights = torch.ones(logits.shape[:2], device=logits.device)
            probs = self._with_losses(probs, logits, chosen.view(logits.shape), token_weights)
            if self.watched:
                self._seen[4:] += torch.stack([chosen.sum(), chosen.sum() - (chosen & kept).sum()])  # type: ignore[index]
        return probs, kept

    def _with_losses(
        self, probs: torch.Tensor, logits: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """``probs``, whose backward pass adds the gradients of the losses; counts what was chosen.

        The sum over all ranks of the tokens' losses, each times its weight, is the global batch's once it is divided by
        the weights' sum, as the engine divides all gradients.
        """
        experts = self.experts
        counted = chosen * weights.unsqueeze(-1)  # [s/tp, b, experts]
        with torch.no_grad():
            self._counts = counted.sum((0, 1)) + (0 if self._counts is None else self._counts)
        aux = z_loss = None
        if experts.balancing.endswith("aux"):
            aux = (self._scores(logits) * self._shares(counted)).sum(-1) * self.num_experts  # [s/tp, b]
        if experts.z_weight:
            z_loss = logits.logsumexp(-1).square()
        terms = [(aux, experts.aux_weight), (z_loss, experts.z_weight)]
        losses = [weight * (weights * loss).sum() for loss, weight in terms if loss is not None and weight]
        if self.watched:
            self._add_seen(logits.detach(), weights, aux, z_loss)
        return moe_utils.MoEAuxLossAutoScaler.apply(probs, torch.stack(losses).sum()) if losses else probs

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Each expert's share of a token's scores, ``[s/tp, b, experts]``."""
        if self.score_function == "softmax":
            return logits.softmax(-1, dtype=torch.float32)
        scores = logits.float().sigmoid()
        return scores / (scores.sum(-1, keepdim=True) + 1e-20)

    @torch.no_grad()
    def _shares(self, counted: torch.Tensor) -> torch.Tensor:
        """Each expert's share of the choices, ``[experts]``, or of each sequence's, ``[b, experts]``."""
        if self.experts.balancing == "global_aux":
            return self.last_shares
        counts = counted.sum(0) if self.experts.balancing == "seq_aux" else counted.sum((0, 1))
        if self.tp_cp_group.size() > 1:  # its ranks have the other tokens of these sequences
            dist.all_reduce(counts, group=self.tp_cp_group)
        return counts / counts.sum(-1, keepdim=True).clamp(min=_TINY)

    @torch.no_grad()
    def _add_seen(
        self, logits: torch.Tensor, weights: torch.Tensor, aux: torch.Tensor | None, z_loss: torch.Tensor | None
    ) -> None:
        if self._seen is None:
            self._seen = torch.zeros(len(SEEN), device=logits.device)
        scores = self._scores(logits)
        entropy = -(scores * scores.clamp(min=_TINY).log()).sum(-1)
        zero = torch.zeros_like(entropy)
        z_loss = logits.logsumexp(-1).square() if z_loss is None else z_loss
        values = (torch.ones_like(entropy), zero if aux is None else aux, z_loss, entropy)
        self._seen[:4] += torch.stack([(value * weights).sum() for value in values])

    # What training/window_counts.py asks at the end of a window

    def window_counts(self) -> torch.Tensor:
        """What this rank has counted in the window; it counts anew from here."""
        device = self.weight.device
        counts = torch.zeros(self.num_experts, device=device) if self._counts is None else self._counts
        seen = torch.zeros(len(SEEN), device=device) if self._seen is None else self._seen
        self._counts = self._seen = None
        return torch.cat([counts, seen])

    @torch.no_grad()
    def end_window(self, counts: torch.Tensor) -> None:
        """Balance by what all ranks have counted: ``counts`` is the sum of their ``window_counts``."""
        self.last_seen = counts
        chosen = counts[: self.num_experts]
        if self.experts.balancing == "global_aux":
            total = chosen.sum()
            self.last_shares.copy_(torch.where(total > 0, chosen / total.clamp(min=_TINY), self.last_shares))
        if self.expert_bias is not None and self.weight.requires_grad:  # a frozen router keeps its choices
            self.expert_bias += self.experts.bias_rate * (chosen.mean() - chosen).sign()
