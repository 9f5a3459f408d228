"""A step whose loss or gradient is no number leaves weights and optimizer as they are, fused or not."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_megatron.training.nonfinite import NonFiniteLossError, Unfit
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.layout import Layout
from tests.support.trainer import trainer

BAD = 2
OPTIONS = {"max_epochs": 1, "gradient_clip_val": 1.0}
ROWS = 4
CONFIG = plain_gpt.replace(plain_gpt.GPT2, num_layers=1)


class Bad(LoadedGPT):
    """Its gradient is no number at batch ``BAD``, and its loss is none either if ``loses``."""

    fused = loses = False

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=self.fused)

    def on_train_batch_start(self, batch, batch_idx):
        self.now = batch_idx == BAD

    def loss(self, output, batch):
        total, tokens = super().loss(output, batch)
        bad = total * float("nan") if self.loses else total + 0 * torch.sqrt(total * 0)
        return (bad if self.now else total), tokens


def state(run, module):
    """All weights, and all tensors of the optimizer."""
    optimizer = run.strategy.optimizers[0]
    return [
        *(weight.detach().clone() for weight in module.parameters()),
        *(x.clone() for each in optimizer.state.values() for x in each.values()),
    ]


def trained(batches, fused, on_nonfinite, loses=False, precision="32-true"):
    module = Bad(CONFIG)
    module.fused, module.loses = fused, loses
    samples = {name: x[[r for b in batches for r in range(b * ROWS, b * ROWS + ROWS)]] for name, x in DATA.items()}
    run = trainer(Layout(), {"on_nonfinite": on_nonfinite}, precision, use_distributed_sampler=False, **OPTIONS)
    error = None
    try:
        run.fit(module, DataLoader(Rows(samples), batch_size=ROWS))
    except NonFiniteLossError as stopped:
        error = str(stopped)
    return state(run, module), error


DATA = text_samples(CONFIG, 4 * ROWS)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_bad_step_that_ends_the_run_has_changed_nothing(fused, precision):
    before, _ = trained([0, 1], fused, "raise", precision=precision)
    for loses, message in ((False, "gradient norm is nan"), (True, "loss of step 2 is nan")):
        after, error = trained([0, 1, 2, 3], fused, "raise", loses, precision)
        assert message in error
        assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("fused", [False, True])
def test_a_bad_step_that_is_skipped_has_changed_nothing(fused):
    without, _ = trained([0, 1], fused, "skip")
    skipped, _ = trained([0, 1, 2], fused, "skip")
    further, _ = trained([0, 1, 2, 3], fused, "skip")
    assert all(map(torch.equal, without, skipped))
    assert all(bool(torch.isfinite(x).all()) for x in further)
    assert not all(map(torch.equal, skipped, further))


def test_nothing_looked_at_is_not_unfit():
    assert not Unfit([])
    assert not Unfit([torch.tensor(1.0), torch.tensor([2.0])])
    assert Unfit([torch.tensor(1.0), torch.tensor(float("inf"))])
