"""On several ranks, too, a step between logs reads nothing from the device: the hosts ask one another."""

import pytest
import torch
from torch.utils.data import DataLoader

from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.device_reads import DeviceReads
from tests.support.layout import Layout
from tests.support.ranks import run_in_pool
from tests.support.trainer import trainer


class Fused(LoadedGPT):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=True)  # others ask for their step count, which is on the host


def _reads(layout: Layout, on_nonfinite: str) -> dict[str, int]:
    watch = DeviceReads(batch=1, lists=False)
    strategy = {"num_microbatches": 4, "on_nonfinite": on_nonfinite}
    run = trainer(layout, strategy, max_epochs=1, gradient_clip_val=0.5, callbacks=[watch])
    run.fit(Fused(plain_gpt.GPT2), DataLoader(Rows(text_samples(plain_gpt.GPT2, 32)), batch_size=8))
    return dict(watch.found)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(dp=2)], ids=str)
def test_a_step_reads_once_for_its_check_and_else_nothing(layout):
    assert run_in_pool(2, _reads, layout, "ignore") == [{}, {}]
    assert run_in_pool(2, _reads, layout, "raise") == [{"_local_scalar_dense": 1}] * 2
