"""The joined operations of a layer, and their gradients, are torch's and megatron-core's; here they run uncompiled."""

import functools

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as megatron_rotation

from lightning_megatron.models.activations import FUNCTIONS
from lightning_megatron.models.layers.fused.activation import _formula, biased_activation
from lightning_megatron.models.layers.fused.residual import FusedNorm, fused_bias_dropout_add
from lightning_megatron.models.layers.fused.rotary import cosines_and_sines, rotated_heads
from lightning_megatron.models.model_config import GATED


@pytest.fixture(autouse=True)
def _uncompiled():
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def outputs_and_gradients(function, *tensors):
    """Of a sum of cubes, whose gradients differ from output to output."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    torch.manual_seed(2)
    outputs = function(*leaves)
    sum((output**3).sum() for output in outputs).backward()
    return [*outputs, *(leaf.grad for leaf in leaves)]


def assert_same(ours, theirs, *tensors):
    for some, others in zip(
        outputs_and_gradients(ours, *tensors), outputs_and_gradients(theirs, *tensors), strict=True
    ):
        torch.testing.assert_close(some, others, rtol=1e-4, atol=1e-4)


def draw(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", FusedNorm.norms, ids=str)
def test_sum_and_norm(kind, p, biased):
    norm = FusedNorm.norms[kind](8, eps=1e-5)
    torch.nn.init.normal_(norm.weight)

    def ours(residual, x, *bias):
        return norm(residual, (x, *bias) if biased else (x, None), p)

    def theirs(residual, x, *bias):
        total = residual + F.dropout(x + bias[0] if biased else x, p)
        return total, norm(total)

    assert_same(ours, theirs, *draw((6, 3, 8), (6, 3, 8), *[8] * biased))
    assert_same(lambda x: norm(x, p=0.0), lambda x: (1 * x, norm(x)), *draw((6, 3, 8)))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_sum(p):
    add = fused_bias_dropout_add(True, False)
    tensors = draw((6, 3, 8), 8, (6, 3, 8))
    assert_same(lambda x, b, r: [add((x, b), r, p)], lambda x, b, r: [r + F.dropout(x + b, p)], *tensors)
    assert_same(lambda x, r: [add((x, None), r, p)], lambda x, r: [r + F.dropout(x, p)], *tensors[::2])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activation(name):
    formula = _formula(FUNCTIONS[name], name in GATED, None, 0.0)
    x, bias = draw((6, 3, 8), 8)
    assert_same(lambda x, b: [biased_activation(x, b, formula)], lambda x, b: [formula(x + b)], x, bias)
    assert_same(lambda x: [biased_activation(x, None, formula)], lambda x: [formula(x)], x)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("rows", [1, 3], ids=["one-table", "a-table-each"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_rotation(interleaved, rotated, rows, groups):
    queries, head = 4 // groups, 8
    mixed, angles = draw((6, 3, groups, (queries + 2) * head), (6, rows, 1, rotated // 2))
    twice = torch.stack((angles, angles), -1).flatten(-2) if interleaved else torch.cat((angles, angles), -1)
    table = cosines_and_sines(twice, interleaved, torch.float32)

    def theirs(mixed):
        query, key, value = mixed.split([queries * head, head, head], dim=3)
        rotate = functools.partial(megatron_rotation, freqs=twice, rotary_interleaved=interleaved)
        return rotate(query.reshape(6, 3, 4, head)), rotate(key), value

    assert_same(lambda mixed: rotated_heads(mixed, table, head, interleaved), theirs, mixed)
