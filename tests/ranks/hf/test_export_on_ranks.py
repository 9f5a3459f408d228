"""A model that two ranks hold is exported as one process exports it."""

import pytest
import torch
from safetensors.torch import load_file

from lightning_megatron import AutoModule
from tests.support.ranks import run_ranks
from tests.support.small_llama import hub_llama


@pytest.fixture
def llama(tmp_path):
    return hub_llama(tmp_path / "llama")


def test_each_tensor_keeps_its_type(llama, tmp_path):
    """Some models have norms in fp32 beside weights in bf16."""
    from safetensors.torch import save_file

    weights = load_file(llama / "model.safetensors")
    mixed = {name: tensor.float() + 1e-4 if "norm" in name else tensor for name, tensor in weights.items()}
    save_file(mixed, llama / "model.safetensors", {"format": "pt"})
    run_ranks(2, _export, llama, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert out.keys() == mixed.keys()
    assert all(out[name].dtype == tensor.dtype and torch.equal(out[name], tensor) for name, tensor in mixed.items())


def _export(source, folder):
    AutoModule.from_pretrained(source).build(tp=2).save_pretrained(folder)
