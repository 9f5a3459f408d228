"""Small functions are compiled once for all numbers of tokens, and run as they are where torch cannot compile."""

import pytest
import torch
from torch._dynamo.utils import counters

from lightning_megatron.models.layers.fused import compiled as compiled_functions
from lightning_megatron.models.layers.fused.compiled import compiled


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch):
    monkeypatch.setattr(compiled_functions, "_told", set())
    torch._dynamo.reset()
    counters.clear()


def test_one_compilation_for_all_numbers_of_tokens(monkeypatch):
    monkeypatch.setattr(compiled_functions, "_options", lambda: {"backend": "aot_eager"})
    double = compiled(lambda x, bias: 2 * (x + bias))
    bias = torch.ones(4)
    for tokens in (6, 5, 3, 2, 1):
        assert torch.equal(double(torch.zeros(tokens, 4), bias), torch.full((tokens, 4), 2.0))
    assert counters["stats"]["unique_graphs"] == 1


def test_where_torch_cannot_compile_it_warns_once_and_computes_the_same(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled_functions, "_options", lambda: {"backend": broken})
    functions = [compiled(lambda x: x + 1), compiled(lambda x: x + 2)]
    with pytest.warns(UserWarning, match=r"no compiler here.*fused_layers=False") as warned:
        assert [float(f(torch.zeros(2, 1)).sum()) for f in functions for _ in range(2)] == [2.0, 2.0, 4.0, 4.0]
    assert len(warned) == 1


def test_a_kernel_that_cannot_be_launched_is_left_out_too(monkeypatch):
    """Triton raises its own errors, and the first of them when the kernel is launched."""

    def too_large(*_):
        raise ArithmeticError("out of resource: shared memory")

    monkeypatch.setattr(compiled_functions, "_options", lambda: {"backend": lambda *_: too_large})
    with pytest.warns(UserWarning, match="out of resource: shared memory"):
        assert float(compiled(lambda x: x + 1)(torch.zeros(2, 1)).sum()) == 2.0


def test_memory_that_is_missing_is_not_missing_for_the_compiler(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compiled_functions, "_options", lambda: {"backend": lambda *_: full})
    with pytest.raises(torch.OutOfMemoryError):
        compiled(lambda x: x + 1)(torch.zeros(2, 1))
