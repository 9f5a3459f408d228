"""Sizes that do nothing for a plain LightningModule are refused before a process is started."""

import re

import lightning.pytorch as pl
import pytest
from lightning.pytorch import Trainer

from lightning_megatron import LayoutError, MegatronStrategy
from tests.support.plain_module import CountingModule, plain_data
from tests.support.trainer import QUIET


@pytest.mark.parametrize("run", ["fit", "validate", "predict"])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 2}, r"\(tp=2\): CountingModule .* without parallel layers: each of the 2 tensor-parallel ranks"),
        ({"tp": 2, "sequence_parallel": True}, "without parallel layers: each of the 2 tensor-parallel ranks"),
        ({"sequence_parallel": True}, "without parallel layers: sequence_parallel=True would do nothing"),
        ({"pp": 2}, "CountingModule is a plain LightningModule, which cannot be cut into 2 pipeline stages"),
    ],
    ids=str,
)
@pytest.mark.parametrize("launch", ["subprocess", "forkserver"])
def test_refused_before_a_rank_is_started(run, sizes, message, launch):
    strategy = MegatronStrategy(**sizes, launch=launch)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=1, **QUIET)
    with pytest.raises(LayoutError, match=message) as error:
        getattr(trainer, run)(CountingModule(), plain_data())
    assert re.search(r"Use (\w+)=(1|False)", str(error.value))[1] in sizes
    assert "docs/own_model.md" in str(error.value)
    assert len(str(error.value)) < 330
    assert not getattr(trainer.strategy.launcher, "procs", [])


def test_a_module_that_has_no_pipeline_is_refused_however_it_is_built():
    class Late(pl.LightningModule):
        def configure_model(self):
            raise AssertionError("not reached")

    trainer = Trainer(accelerator="cpu", devices=2, strategy=MegatronStrategy(pp=2), **QUIET)
    with pytest.raises(LayoutError, match="Late is a plain LightningModule, which cannot be cut"):
        trainer.fit(Late(), plain_data())
