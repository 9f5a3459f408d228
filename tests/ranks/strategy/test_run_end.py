"""Runs that end before their last step: where they stop, what is saved, and where they go on."""

from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_megatron.callbacks import ExitInterval, SaveAtEnd
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.lightning_runs import CONFIG, OurGPT
from tests.support.ranks import run_ranks
from tests.support.trainer import QUIET


def _steps(layout: Layout, folder: str) -> list[int]:
    """The step at which each of three runs ends, the later ones resumed from the last checkpoint."""

    def fit(resumed: bool) -> int:
        keep = ModelCheckpoint(f"{folder}/kept", "{step}", every_n_train_steps=3, save_top_k=-1, save_last=True)
        settings: dict[str, Any] = {**QUIET, "max_steps": 9, "enable_checkpointing": True, "default_root_dir": folder}
        ends = [SaveAtEnd(), ExitInterval(4), keep]
        run = Trainer(accelerator="cpu", devices=2, strategy=layout.strategy(), **settings, callbacks=ends)
        run.fit(
            OurGPT(CONFIG),
            DataLoader(Rows(text_samples(CONFIG, 32)), batch_size=4),
            ckpt_path="last" if resumed else None,
        )
        return run.global_step

    return [fit(False), fit(True), fit(True)]


def test_a_run_ends_at_each_multiple_and_goes_on_from_there(tmp_path):
    """The checkpoints of every third step alone would resume at 3 and at 6, and end at 4 again."""
    assert run_ranks(2, _steps, Layout(pp=2), str(tmp_path)) == [[4, 8, 9]] * 2
    assert (tmp_path / "kept" / "last.ckpt").exists()


def test_an_interval_is_a_number_of_steps():
    with pytest.raises(ValueError, match=r"ExitInterval\(steps=0\): use a whole number from 1"):
        ExitInterval(0)
