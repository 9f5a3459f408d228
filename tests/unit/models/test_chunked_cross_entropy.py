"""The loss in chunks of tokens is torch's cross-entropy of the logits, and its gradients are autograd's."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_megatron.models.layers.chunked_cross_entropy import ChunkedCrossEntropy, OutputWeights, WeightedLabels
from lightning_megatron.training.weight_gradients import accept_products

TOKENS, WIDTH, IDS, PADDED, CHUNK = 37, 8, 50, 64, 10


def weights(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, OutputWeights]:
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    return leaf(TOKENS, WIDTH), OutputWeights(leaf(PADDED, WIDTH), leaf(PADDED))


def weighted_labels(generator_seed: int = 2) -> WeightedLabels:
    generator = torch.Generator().manual_seed(generator_seed)
    weight = torch.rand(TOKENS, generator=generator)
    weight[::5] = 0.0
    return WeightedLabels(torch.randint(0, IDS, (TOKENS,), generator=generator), weight)


def plain(
    hidden: torch.Tensor,
    output: OutputWeights,
    ids: torch.Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_cap: float | None = None,
) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, *output)[:, :IDS].float()
    logits = logits if logits_cap is None else logits_cap * (logits / logits_cap).tanh()
    loss = torch.nn.functional.cross_entropy(logits, ids, reduction="none", label_smoothing=label_smoothing)
    return loss + z_loss * logits.logsumexp(1) ** 2


def gradients(loss: torch.Tensor, hidden: torch.Tensor, output: OutputWeights) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 3.0, [hidden, *output])]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "terms",
    [{}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"label_smoothing": 0.1, "logits_cap": 3.0}],
    ids=["plain", "smooth", "capped"],
)
@pytest.mark.parametrize("summed", [True, False], ids=["sum", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_cross_entropy(dtype, summed, terms, compiled):
    hidden, output = weights(dtype)
    labels = weighted_labels()
    entropy = ChunkedCrossEntropy(first=0, rows=IDS, vocab_size=IDS, chunk=CHUNK, compiled=compiled, **terms)
    expected = gradients((plain(hidden, output, labels.ids, **terms) * labels.weights).sum(), hidden, output)
    if summed:
        loss = entropy.total(hidden, output, labels)
    else:
        loss = (entropy.losses(hidden, output, labels.ids) * labels.weights).sum()
    band = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    band *= 1 + ("logits_cap" in terms)  # whose derivative is rounded, too
    for ours, theirs in zip(gradients(loss, hidden, output), expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-5, atol=band * float(theirs.abs().max()))


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return made


@pytest.mark.parametrize("summed", [True, False], ids=["sum", "each"])
def test_no_tensor_has_the_logits_of_more_than_a_chunk(summed):
    hidden, output = weights()
    labels = weighted_labels()
    entropy = ChunkedCrossEntropy(first=0, rows=IDS, vocab_size=IDS, chunk=CHUNK)
    with Largest() as largest:
        plain(hidden, output, labels.ids).sum().backward()
    assert largest.elements == TOKENS * PADDED
    with Largest() as largest:
        found = entropy.total(hidden, output, labels) if summed else entropy.losses(hidden, output, labels.ids).sum()
        found.backward()
    assert largest.elements <= CHUNK * PADDED


def test_what_waits_for_the_backward_pass_does_not_grow_with_tokens_times_vocabulary():
    hidden, output = weights()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        ChunkedCrossEntropy(first=0, rows=IDS, vocab_size=IDS, chunk=CHUNK).total(hidden, output, weighted_labels())
    assert sum(saved) <= 2 * TOKENS * WIDTH + PADDED * (WIDTH + 1)


@pytest.mark.parametrize("summed", [True, False], ids=["sum", "each"])
def test_a_buffer_that_accepts_products_gets_the_weights_gradient(summed):
    hidden, output = weights()
    labels, entropy = weighted_labels(), ChunkedCrossEntropy(first=0, rows=IDS, vocab_size=IDS, chunk=CHUNK)
    expected = gradients(entropy.total(hidden, output, labels), hidden, output)
    output.weight.main_grad = torch.ones(PADDED, WIDTH)
    accept_products([output.weight])
    loss = entropy.total(hidden, output, labels) if summed else entropy.losses(hidden, output, labels.ids)
    (loss * (1.0 if summed else labels.weights) * 3.0).sum().backward()
    torch.testing.assert_close(output.weight.main_grad - 1, expected[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad, expected[1])
    assert output.weight.grad is None


def test_a_frozen_weight_and_an_evaluation_compute_no_gradient_of_it():
    hidden, output = weights()
    frozen = OutputWeights(output.weight.detach(), None)
    labels, entropy = weighted_labels(), ChunkedCrossEntropy(first=0, rows=IDS, vocab_size=IDS, chunk=CHUNK)
    (ours,) = torch.autograd.grad(entropy.total(hidden, frozen, labels), hidden)
    (theirs,) = torch.autograd.grad((plain(hidden, frozen, labels.ids) * labels.weights).sum(), hidden)
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert not entropy.total(hidden, output, labels).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_token_counts(dtype):
    hidden, output = weights(dtype)
    nobody = WeightedLabels.without(torch.full((TOKENS,), -100), -100)
    total = ChunkedCrossEntropy(first=0, rows=IDS, vocab_size=IDS, chunk=CHUNK).total(hidden, output, nobody)
    assert all(not bool(each.any()) for each in gradients(total, hidden, output))
