"""The code of docs/lora.md runs, and peft and transformers load what it leaves."""

import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import torch
import transformers

ROOT = Path(__file__).parents[1]


def test_the_code_of_the_page_runs(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "lora.md").read_text(), re.DOTALL)
    (tmp_path / "lora.py").write_text(block)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "lora.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-3000:]

    def load(name):
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()

    ids = torch.arange(40, 72)[None]
    base = load("pretrained")
    before = base(ids, labels=ids).loss.item()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert adapted(ids, labels=ids).loss.item() < before - 0.5  # it has learned to count
    torch.testing.assert_close(load("merged")(ids).logits, adapted(ids).logits, rtol=0, atol=1e-4)
