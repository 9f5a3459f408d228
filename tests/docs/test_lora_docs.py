"""The code of docs/lora.md runs, and peft and transformers load what it leaves."""

import peft
import torch
import transformers

from tests.support.pages import blocks, script


def test_the_code_of_the_page_runs(tmp_path):
    (block,) = blocks("lora.md")
    script(tmp_path, block)

    def load(name):
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()

    ids = torch.arange(40, 72)[None]
    base = load("pretrained")
    before = base(ids, labels=ids).loss.item()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert adapted(ids, labels=ids).loss.item() < before - 0.5  # it has learned to count
    torch.testing.assert_close(load("merged")(ids).logits, adapted(ids).logits, rtol=0, atol=1e-4)
