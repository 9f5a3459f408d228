"""The output layer of language models: logits over the vocabulary, or the losses of labels without the logits."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.utils import VocabUtility

from lightning_megatron.models.kernels import Kernels
from lightning_megatron.models.layers.chunked_cross_entropy import ChunkedCrossEntropy, OutputWeights, WeightedLabels
from lightning_megatron.models.loss_terms import WANT_LOGITS, LossTerms


class OutputLayer(ColumnParallelLinear):
    """megatron-core's vocabulary-parallel layer, whose padded ids have no probability and no gradient.

    Megatron lets them take part, so that a vocabulary that does not divide trains a little differently for each
    tensor-parallel size; here every layout trains the same model.
    """

    _rows: int  # those of this rank that are token ids; padding is behind them
    _loss: ChunkedCrossEntropy | None
    _terms: LossTerms
    _cap: float | None = None

    @classmethod
    def become(
        cls,
        layer: ColumnParallelLinear,
        vocab_size: int,
        kernels: Kernels,
        terms: LossTerms,
        cap: float | None = None,
    ) -> None:
        """Make megatron-core's layer one, where its model has built it.

        Args:
            layer: The layer.
            vocab_size: Token ids that occur.
            kernels: Whether losses are computed in chunks of tokens.
            terms: What losses have beside the cross-entropy where gradients are computed; they need those chunks.
            cap: What no logit is beyond, as ``cap · tanh(logit / cap)``. None: there is no cap.
        """
        shard, group = layer.output_size_per_partition, layer.tp_group
        first, _ = VocabUtility.vocab_range_from_per_partition_vocab_size(shard, group.rank(), group.size())
        rows = min(max(vocab_size - first, 0), shard)
        layer.__class__ = cls
        layer._rows = rows
        layer._loss, layer._terms, layer._cap = None, terms, cap
        wanting = [name for name in WANT_LOGITS if getattr(layer.config, name)]
        if kernels.chunked_loss and wanting:
            rank_zero_warn(f"The loss is computed from all logits at once, which extra={{{wanting[0]!r}: ...}} wants.")
        elif kernels.chunked_loss or terms:
            layer._loss = ChunkedCrossEntropy(
                first=first,
                rows=rows,
                vocab_size=vocab_size,
                group=group,
                logits_cap=cap,
                compiled=bool(kernels.fused_layers),
            )

    @property
    def gives_losses(self) -> bool:
        """Whether it takes labels. A hook on its output, which sees logits, keeps it from that."""
        return self._loss is not None and not self._forward_hooks

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: torch.Tensor | WeightedLabels | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """As megatron-core's layer, and with labels their losses in place of the logits.

        Args:
            input_: Hidden states ``[s/tp, b, h]`` under sequence parallelism, else ``[s, b, h]``.
            weight: The weight, if it is another layer's.
            runtime_gather_output: Whether the logits of all ranks are gathered.
            labels: ``[b, s]``, for layers with ``gives_losses``.

        Returns:
            Logits ``[s, b, vocab/tp]``, or the losses ``[b, s]`` of labels, or the sum of those of weighted labels;
            and None.
        """
        if labels is not None:
            return self._losses(
                input_, OutputWeights(self.weight if weight is None else weight, self.bias), labels
            ), None
        if self._terms and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"Logits were asked for in training, and a loss of them would lack {self._terms} of the module. Leave"
                " it out and compute it from the logits; or remove hooks on the output layer, and take the loss from"
                " super().training_step."
            )
        logits, bias = super().forward(input_, weight, runtime_gather_output)
        if self._cap is not None:
            logits = (logits / self._cap).tanh() * self._cap
        if self._rows < self.output_size_per_partition == logits.size(-1):  # gathered logits are cut off instead
            padding = torch.arange(logits.size(-1), device=logits.device) >= self._rows
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        return logits, bias

    def _losses(
        self, hidden: torch.Tensor, output: OutputWeights, labels: torch.Tensor | WeightedLabels
    ) -> torch.Tensor:
        assert self._loss is not None
        terms = asdict(self._terms) if torch.is_grad_enabled() else {}
        loss = replace(self._loss, group=self.tp_group, **terms)  # the group of this run, which may be a later one
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        if isinstance(labels, WeightedLabels):
            return loss.total(hidden, output, WeightedLabels(labels.ids.t(), labels.weights.t(), labels.number))
        return loss.losses(hidden, output, labels.t()).t()


def add_bias(layer: ColumnParallelLinear) -> None:
    """Give megatron-core's output layer a bias ``[vocab/tp]`` of zeros, which its GPT has none of."""
    size, device = layer.output_size_per_partition, torch.get_default_device()
    layer.bias = torch.nn.Parameter(torch.zeros(size, dtype=layer.config.params_dtype, device=device))
    set_tensor_model_parallel_attributes(layer.bias, True, 0, 1)


def cross_entropy_over_shards(
    output: torch.Tensor, labels: torch.Tensor, ignored: int, number: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross-entropy of the tokens that have a label, and their number.

    Args:
        output: Logits ``[b, s, vocab/tp]``, or that sum already. The logits are kept: megatron-core writes over what it
            is given, here a copy of the counted rows.
        labels: ``[b, s]``.
        ignored: The label of tokens that are not counted.
        number: How many are counted, where the host knows it; None waits for the device, which counts them.
    """
    counted = labels != ignored
    if output.dim() == 0:
        return output, counted.sum()
    places = counted.nonzero() if number is None else torch.nonzero_static(counted, size=number)  # [n, 2]
    rows, tokens = places.unbind(1)
    losses = vocab_parallel_cross_entropy(output[rows, tokens], labels[rows, tokens])  # [n]
    return losses.float().sum(), counted.sum()
