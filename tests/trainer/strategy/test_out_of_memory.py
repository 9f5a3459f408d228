"""An out-of-memory error ends with what the training takes, and what would take less."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_megatron import GPTConfig, GPTModule, Kernels, ParallelLayout
from lightning_megatron.strategy.out_of_memory import explain, is_out_of_memory
from tests.support.layout import Layout
from tests.support.trainer import trainer

CONFIG = GPTConfig(num_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=128, seq_length=16)


class Greedy(GPTModule):
    def loss(self, output, batch):
        torch.empty(2**50)  # more than any machine has
        return super().loss(output, batch)


def test_a_failed_allocation_ends_with_the_table():
    kernels = Kernels(fused_layers=False, chunked_loss=False)
    run = trainer(Layout(), {"micro_batch_size": 2, "kernels": kernels}, max_steps=1)
    rows = [{"input_ids": torch.arange(16)} for _ in range(4)]
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        run.fit(Greedy(CONFIG), DataLoader(rows, batch_size=4))
    (note,) = caught.value.__notes__
    lines = note.splitlines()
    assert lines[0] == "Training takes, by the sizes of GPTConfig:"
    settings = {"micro_batch_size": 2, "precision": "32-true", "kernels": kernels, "device": "cpu"}
    table = CONFIG.memory(ParallelLayout(world_size=1), **settings)
    assert "\n".join(lines[1:9]) == str(table)
    # No chunks: so few tokens have smaller logits than the weight gradient that a loss in chunks keeps.
    assert [line.partition(":")[0] for line in lines[10:-1]] == [
        "- micro_batch_size=1", '- recompute="selective"', '- recompute="full"',
    ]  # fmt: skip
    assert "a larger tp (with sequence_parallel=True), pp or" in lines[-1]


def _note(error: BaseException, config=CONFIG, **layout) -> str:
    training = {
        "micro_batch_size": 1, "recompute": "full", "kernels": Kernels(chunked_loss=True), "precision": "bf16-mixed",
        "distributed_optimizer": False, "device": "cuda",
    }  # fmt: skip
    explain(error, config, ParallelLayout(**layout), **training)
    return "\n".join(getattr(error, "__notes__", []))


def test_only_what_is_not_on_already_is_advised():
    note = _note(torch.OutOfMemoryError("CUDA out of memory."), world_size=4, tp=2)
    advised = [line.partition(":")[0] for line in note.splitlines() if line.startswith("- ")]
    assert advised[:-1] == ["- distributed_optimizer=True", "- sequence_parallel=True"]


def test_other_errors_and_modules_without_sizes():
    assert _note(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), world_size=1) == ""
    assert "distributed_optimizer=True" in _note(torch.OutOfMemoryError("no memory"), None, world_size=2)
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))
