"""The loss in chunks of tokens over a vocabulary that ranks share; one of them may have nothing but padding."""

import pytest
import torch
import torch.distributed as dist

from lightning_megatron.models.layers.chunked_cross_entropy import ChunkedCrossEntropy, OutputWeights, WeightedLabels
from tests.support.ranks import run_ranks

TOKENS, WIDTH, SHARD, CHUNK = 23, 8, 32, 10


def differentiate(ids: int, summed: bool) -> list[float]:
    """The largest differences of the loss and of each gradient to those of the whole vocabulary."""
    dist.init_process_group("gloo")
    first, generator = dist.get_rank() * SHARD, torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    whole = OutputWeights(*(torch.randn(2 * SHARD, *more, generator=generator) for more in ((WIDTH,), ())))
    labels = WeightedLabels(*(torch.rand(2, TOKENS, generator=generator) * torch.tensor([[ids], [1]])))
    labels = labels._replace(ids=labels.ids.long())
    logits = torch.nn.functional.linear(hidden, *(each.requires_grad_() for each in whole))[:, :ids]
    smoothed = torch.nn.functional.cross_entropy(logits, labels.ids, reduction="none", label_smoothing=0.1)
    expected = ((smoothed + 0.01 * logits.logsumexp(1) ** 2) * labels.weights).sum()
    mine = OutputWeights(*(each.detach()[first : first + SHARD].requires_grad_() for each in whole))
    rows = min(max(ids - first, 0), SHARD)
    entropy = ChunkedCrossEntropy(
        first=first, rows=rows, vocab_size=ids, group=dist.group.WORLD, chunk=CHUNK, label_smoothing=0.1, z_loss=0.01
    )
    if summed:
        loss = entropy.total(hidden, mine, labels)
    else:
        loss = (entropy.losses(hidden, mine, labels.ids) * labels.weights).sum()
    ours, theirs = torch.autograd.grad(loss, [hidden, *mine]), torch.autograd.grad(expected, [hidden, *whole])
    dist.all_reduce(ours[0])  # as the layer does behind it
    pairs = [(loss, expected), (ours[0], theirs[0])]
    pairs += [(part, each[first : first + SHARD]) for part, each in zip(ours[1:], theirs[1:], strict=True)]
    return [float((a - b).detach().abs().max()) for a, b in pairs]


@pytest.mark.parametrize("summed", [True, False], ids=["sum", "each"])
@pytest.mark.parametrize("ids", [50, 30], ids=["padding", "a-shard-of-padding"])
def test_shards_of_a_vocabulary(ids, summed):
    for differences in run_ranks(2, differentiate, ids, summed):
        assert max(differences) < 2e-5
