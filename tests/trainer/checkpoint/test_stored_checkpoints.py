"""Checkpoints that were written before the package's modules moved still load, and a run goes on from them."""

import tarfile

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_megatron import BertModule, GPTModule, MegatronStrategy, T5Module
from tests.support.pages import ROOT

STORED = ROOT / "tests/assets/checkpoints_before_the_move.tar.xz"
QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [("gpt_lora", GPTModule), ("bert", BertModule), ("t5", T5Module)])
def test_a_checkpoint_of_the_old_layout_loads(name, kind, tmp_path):
    with tarfile.open(STORED) as stored:
        stored.extractall(tmp_path, filter="data")
    module = kind.load_from_checkpoint(tmp_path / name)
    assert module.config.hidden_size == 8
    assert (module.lora is not None) == (name == "gpt_lora")
    row = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=3, strategy=MegatronStrategy(), **QUIET)
    trainer.fit(
        kind(module.config, lora=module.lora), torch.utils.data.DataLoader([row] * 4, 2), ckpt_path=tmp_path / name
    )
    assert trainer.global_step == 3
