"""The code of docs/hf.md runs, and the family that it adds is transformers'."""

import pytest
import torch
import transformers

from lightning_megatron import AutoModule
from lightning_megatron.hf import family
from tests.support.pages import blocks, script, shell

FINETUNE, ADDED = blocks("hf.md")
(COMMAND,) = blocks("hf.md", "bash")


def test_finetuning_and_the_command(tmp_path):
    script(tmp_path, FINETUNE)
    shell(tmp_path, COMMAND)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    finetuned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "finetuned")
    start = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained")
    ids = torch.arange(40, 72)[None]
    assert finetuned(ids, labels=ids).loss < start(ids, labels=ids).loss - 0.5  # it has learned to count


@pytest.mark.parametrize("parallel", [False, True])
def test_the_family_that_is_added(tmp_path, monkeypatch, parallel):
    monkeypatch.setattr(family, "_FAMILIES", dict(family._FAMILIES))
    assert ADDED.count("\n") < 80
    exec(compile(ADDED, "hf.md", "exec"), {"__name__": "stablelm"})
    torch.manual_seed(0)
    config = transformers.StableLmConfig(
        vocab_size=211, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, use_qkv_bias=True,
        use_parallel_residual=parallel,
    )  # fmt: skip
    model, ids = transformers.StableLmForCausalLM(config).eval(), torch.randint(0, 211, (2, 33))
    module = AutoModule.from_pretrained(model).eval()
    module.save_pretrained(tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(module(input_ids=ids), expected, rtol=0, atol=1e-5)
        assert torch.equal(back(ids).logits, expected)
