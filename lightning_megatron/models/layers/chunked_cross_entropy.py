"""Computes an output layer and its cross-entropy in chunks of tokens, so that the logits of all tokens never exist.

The gradients of a sum of losses are linear in the one number that comes back to it, so each chunk's are computed beside
its loss, while its logits exist; the backward pass only scales them. The gradients of losses that are not summed yet
are known in the backward pass only, which computes the logits a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from lightning_megatron.models.layers import logits_gradient
from lightning_megatron.training.weight_gradients import add_product, device_adds, takes_product

# By the device. A weight's gradient is added up once for each chunk, which costs a GPU as much as some 400 tokens do.
LONGEST_CHUNK = {"cuda": 4096, "cpu": 512}


class WeightedLabels(NamedTuple):
    """Labels whose losses are wanted as one sum.

    Args:
        ids: Token ids, of any shape.
        weights: What each token's loss counts, of the same shape; 0 leaves it out, whatever its label.
        number: How many weights are not 0, where the host knows it. None: a GPU computes the losses of all tokens, so
            that the host need not wait until it has counted them.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    number: int | None = None

    @classmethod
    def without(cls, ids: torch.Tensor, ignored: int, number: int | None = None) -> Self:
        """Labels that count one each, but for those that are ``ignored``; ``number`` of them are counted."""
        return cls(ids, (ids != ignored).float(), number)


class OutputWeights(NamedTuple):
    """The weights of an output layer.

    Args:
        weight: ``[rows, h]``, this rank's shard.
        bias: ``[rows]``, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class ChunkedCrossEntropy:
    """The cross-entropy over a vocabulary of which this rank holds a shard.

    Args:
        first: Token id of the shard's first row.
        rows: Rows of the shard that are token ids. Those behind them are padding, and have no probability.
        vocab_size: Token ids of the whole vocabulary.
        group: The tensor-parallel group. None: the shard is the whole vocabulary.
        label_smoothing: Share of a label that is spread evenly over all ids, as in ``torch.nn.CrossEntropyLoss``.
        z_loss: Weight of the squared logarithm of the sum of exponentials, which keeps it near 0 (PaLM, section 5).
        logits_cap: What no logit is beyond, as ``cap · tanh(logit / cap)``. None: there is no cap.
        chunk: Tokens whose logits exist at once. None: a number for the device.
        compiled: Whether ``torch.compile`` joins the operations on a chunk's logits.
    """

    first: int
    rows: int
    vocab_size: int
    group: dist.ProcessGroup | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logits_cap: float | None = None
    chunk: int | None = None
    compiled: bool = False

    def losses(self, hidden: torch.Tensor, output: OutputWeights, labels: torch.Tensor) -> torch.Tensor:
        """The loss of each token.

        Args:
            hidden: ``[..., h]``, the same on all ranks of the group; so are the labels.
            output: The layer's weights.
            labels: ``[...]``, token ids.

        Returns:
            ``[...]`` in fp32.
        """
        rows = hidden.flatten(0, -2)
        losses: torch.Tensor = _Losses.apply(  # type: ignore[no-untyped-call]
            rows, *output, labels.flatten(), self, takes_product(output.weight)
        )
        return losses.view(labels.shape)

    def total(self, hidden: torch.Tensor, output: OutputWeights, labels: WeightedLabels) -> torch.Tensor:
        """The sum of the weighted losses.

        Args:
            hidden: ``[..., h]``, the same on all ranks of the group; so are the labels.
            output: The layer's weights.
            labels: ``[...]``.

        Returns:
            A scalar in fp32.
        """
        rows, ids, weights = hidden.flatten(0, -2), labels.ids.flatten(), labels.weights.flatten().float()
        number = labels.number
        if number is None and rows.device.type == "cpu":
            number = int(weights.count_nonzero())
        if number is not None and number < len(rows):
            counted = torch.nonzero_static(weights, size=number).flatten()
            rows, ids, weights = rows[counted], ids[counted], weights[counted]
        if rows.dtype == torch.float16:  # unscaled gradients would underflow, and the loss scale comes back later
            return (self.losses(rows, output, ids) * weights).sum()
        graded = torch.is_grad_enabled()
        total: torch.Tensor = _Total.apply(  # type: ignore[no-untyped-call]
            rows, *output, ids, weights, self, graded, takes_product(output.weight)
        )
        return total

    def chunks(self, rows: torch.Tensor) -> list[slice]:
        """The fewest parts of the tokens ``[n, h]`` that are no longer than ``chunk``, and as long as each other."""
        tokens, longest = len(rows), self.chunk or LONGEST_CHUNK.get(rows.device.type, 4096)
        size = -(-tokens // max(-(-tokens // longest), 1))
        return [slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), max(size, 1))]

    def logits(self, rows: torch.Tensor, output: OutputWeights) -> torch.Tensor:
        """``[n, rows]`` of a chunk ``[n, h]``; padding keeps its columns, since odd widths are slow to multiply."""
        weight, bias = output
        logits = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        if self.logits_cap is not None:
            logits = logits.div_(self.logits_cap).tanh_().mul_(self.logits_cap)
        logits[:, self.rows :] = float("-inf")
        return logits

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """The labels' columns in the shard, −1 where another rank has them, or none."""
        columns = labels - self.first
        return columns.masked_fill((columns < 0) | (columns >= self.rows), -1)

    def statistics(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """What the loss needs of a chunk's logits, ``[2, n]`` or ``[3, n]``; see ``logits_gradient``."""
        return logits_gradient.statistics(self.compiled)(logits, targets, self.rows if self.label_smoothing else None)

    def joined(self, statistics: torch.Tensor) -> torch.Tensor:
        """The statistics over all shards of the vocabulary."""
        if self.group is None or self.group.size() == 1 or not statistics.numel():
            return statistics
        every = statistics.new_empty(self.group.size(), *statistics.shape)
        dist.all_gather_into_tensor(every.flatten(0, 1), statistics.contiguous(), group=self.group)
        return torch.cat((every[:, :1].logsumexp(0), every[:, 1:].sum(0)))

    def loss(self, statistics: torch.Tensor) -> torch.Tensor:
        """The loss ``[n]`` of each token, of statistics over all shards."""
        lse, label_logits = statistics[0], statistics[1]
        loss = lse - (1 - self.label_smoothing) * label_logits
        if self.label_smoothing:
            loss = loss - self.label_smoothing / self.vocab_size * statistics[2]
        return loss + self.z_loss * lse.square() if self.z_loss else loss

    def differentiate(
        self, logits: torch.Tensor, lse: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor
    ) -> None:
        """Put the gradient of ``Σ scale · loss`` in the place of a chunk's logits; the others are ``[n]``.

        It is the gradient of what the output layer's product gives, before a cap.
        """
        slope = None if self.logits_cap is None else 1 - (logits / self.logits_cap).square()
        factors = [scale * (1 + 2 * self.z_loss * lse), scale * (1 - self.label_smoothing)]
        if self.label_smoothing:
            factors.append(scale * (self.label_smoothing / self.vocab_size))
        logits_gradient.into(self.compiled)(logits, lse, targets, torch.stack(factors), self.rows)
        if slope is not None:
            logits.mul_(slope.clamp_(min=0))  # padding has no gradient, and its logits are -inf


class _Total(torch.autograd.Function):
    """The sum of weighted losses, whose gradients are computed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        weights: torch.Tensor,
        entropy: ChunkedCrossEntropy,
        graded: bool,
        takes_product: bool,
    ) -> torch.Tensor:
        output, targets = OutputWeights(weight, bias), entropy.targets(labels)
        gradients = _Gradients(rows, output, ctx.needs_input_grad) if graded else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        for part in entropy.chunks(rows):
            logits = entropy.logits(rows[part], output)
            statistics = entropy.joined(entropy.statistics(logits, targets[part]))
            total += (entropy.loss(statistics) * weights[part]).sum()
            if gradients is not None:
                entropy.differentiate(logits, statistics[0], targets[part], weights[part])
                gradients.add(part, logits)
        if gradients is not None:
            ctx.save_for_backward(*gradients.found)
        ctx.takes_product, ctx.weight = takes_product, weight
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> Any:
        rows, weight, bias = ctx.saved_tensors
        if ctx.takes_product and weight is not None:
            main_grad = ctx.weight.main_grad
            main_grad.addcmul_(weight.to(main_grad.dtype), scale.to(main_grad.dtype))
            weight = None
        found = [each if each is None else (each * scale).to(ctx.weight.dtype) for each in (rows, weight, bias)]
        return *found, *[None] * 5


class _Losses(torch.autograd.Function):
    """The loss of each token; the backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        entropy: ChunkedCrossEntropy,
        takes_product: bool,
    ) -> torch.Tensor:
        output, targets = OutputWeights(weight, bias), entropy.targets(labels)
        parts = entropy.chunks(rows)
        here = [entropy.statistics(entropy.logits(rows[part], output), targets[part]) for part in parts]
        statistics = entropy.joined(torch.cat(here, 1))
        ctx.save_for_backward(rows, weight, bias, targets, statistics[0])
        ctx.takes_product, ctx.weight, ctx.entropy = takes_product, weight, entropy
        return entropy.loss(statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scales: torch.Tensor) -> Any:
        rows, weight, bias, targets, lse = ctx.saved_tensors
        entropy, output = ctx.entropy, OutputWeights(weight, bias)
        gradients = _Gradients(rows, output, ctx.needs_input_grad)
        if ctx.takes_product and gradients.found[1] is not None:
            gradients.found[1] = ctx.weight.main_grad
        for part in entropy.chunks(rows):
            logits = entropy.logits(rows[part], output)
            entropy.differentiate(logits, lse[part], targets[part], scales[part])
            gradients.add(part, logits)
        if ctx.takes_product:
            gradients.found[1] = None
        found = [each if each is None else each.to(weight.dtype) for each in gradients.found]
        return *found, *[None] * 3


class _Gradients:
    """Collects the gradients of the hidden states, the weight and the bias; the last two are sums over chunks."""

    def __init__(self, rows: torch.Tensor, output: OutputWeights, wanted: tuple[bool, ...]) -> None:
        self._rows, self._output = rows, output
        self.found: list[torch.Tensor | None] = [None, None, None]
        if wanted[0]:
            self.found[0] = torch.empty_like(rows)
        for number, parameter in enumerate(output, start=1):
            if wanted[number] and parameter is not None:
                self.found[number] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)

    def add(self, part: slice, of_logits: torch.Tensor) -> None:
        """Take a chunk's gradient ``[n, rows]`` of the logits."""
        rows, weight, bias = self.found
        if rows is not None:
            torch.mm(of_logits, self._output.weight, out=rows[part])
        if weight is not None:
            _add_product(weight, of_logits, self._rows[part])
        if bias is not None:
            bias += of_logits.sum(0, dtype=torch.float32)


def _add_product(total: torch.Tensor, of_output: torch.Tensor, inputs: torch.Tensor) -> None:
    if inputs.dtype == total.dtype or (inputs.is_cuda and device_adds(inputs.device, inputs.dtype)):
        add_product(inputs, of_output, total)
    else:
        total.add_(of_output.t() @ inputs)
