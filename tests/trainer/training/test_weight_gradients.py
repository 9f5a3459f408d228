"""Weight gradients that the product adds to the buffer are those that autograd would have returned."""

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from megatron.core.distributed import DistributedDataParallelConfig
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_megatron.models.kernels import Kernels
from lightning_megatron.training import weight_gradients
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.layout import Layout
from tests.support.small_gpt import SMALL
from tests.support.trainer import trainer


class Penalised(LoadedGPT):
    """Its loss reads weights past their layers: a gradient that is no product."""

    def loss(self, output, batch):
        total, count = super().loss(output, batch)
        return total + 20 * sum(w.square().sum() for n, w in self.named_parameters() if "linear_fc" in n), count


def weights(fused, kind=LoadedGPT, precision="32-true", prepare=lambda module: None, **options):
    module = kind(SMALL)
    strategy = {"kernels": Kernels(fused_weight_gradients=fused), "micro_batch_size": 2, **options}
    callbacks = [LambdaCallback(on_train_start=lambda *_: prepare(module))]
    settings = {"max_steps": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "callbacks": callbacks}
    run = trainer(Layout(), strategy, precision, **settings)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run.fit(module, DataLoader(Rows(text_samples(SMALL, 16)), batch_size=4))
    products = sum(event.count for event in profiled.key_averages() if event.key == "aten::addmm_")
    return {name: weight.detach().float() for name, weight in module.named_parameters()}, products, module


def assert_same(seen, expected, tolerance=1e-6):
    for name, weight in expected.items():
        assert torch.allclose(seen[name], weight, rtol=0, atol=tolerance), name


ADDED = 2 * 2 * 2 * (4 * SMALL.num_layers + 1)  # of steps, batches, micro-batches, and linear layers


@pytest.mark.parametrize("kind", [LoadedGPT, Penalised])
def test_the_product_adds_to_the_buffer(kind):
    expected, none, _ = weights(False, kind)
    seen, added, _ = weights(True, kind)
    assert (none, added) == (0, ADDED)
    assert_same(seen, expected)


def test_a_hook_on_a_weight_still_sees_its_gradient():
    def freeze_half(module):
        module.chunks[0].decoder.layers[0].mlp.linear_fc1.weight.register_hook(lambda gradient: gradient * 0.5)

    expected, _, _ = weights(False, prepare=freeze_half)
    seen, added, _ = weights(True, prepare=freeze_half)
    assert added == ADDED * 8 / 9
    assert_same(seen, expected)


@pytest.mark.parametrize(("precision", "added"), [("bf16-mixed", 0), ("bf16-true", ADDED)])
def test_in_half_precision(precision, added):
    expected, _, _ = weights(False, precision=precision)
    seen, products, _ = weights(True, precision=precision)
    assert products == added
    assert_same(seen, expected, 2e-3 if added else 0)


def test_overlapped_reduction_waits_for_gradients_as_tensors():
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=True)
    expected, _, _ = weights(False, ddp=ddp)
    seen, products, _ = weights(True, ddp=ddp)
    assert products == 0
    assert_same(seen, expected, 0)


def test_after_a_fit_autograd_returns_the_gradients():
    _, _, module = weights(True)
    layer = module.chunks[0].decoder.layers[0].mlp.linear_fc1
    layer(torch.ones(3, 1, SMALL.hidden_size))[0].sum().backward()
    assert layer.weight.grad.unique().tolist() == [3.0]


def test_a_device_without_the_product_is_told_once():
    weight_gradients.device_adds.cache_clear()
    with pytest.warns(UserWarning, match="cannot add a product of torch.bfloat16 to fp32 on cpu"):
        assert not weight_gradients.device_adds(torch.device("cpu"), torch.bfloat16)
