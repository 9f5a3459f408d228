"""Measures the memory that a rank takes to load and to save a pretrained model, against its own weights.

    python benchmarks/pretrained.py                # a Llama of 0.3 B on two ranks, tp=2, in fp32
    LAYERS=16 DEVICES=4 PP=2 python benchmarks/pretrained.py

The script prints one line per rank; ``benchmarks/README.md`` has the figures and the machine they are from.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from lightning_megatron import GPTModule, MegatronStrategy

LAYERS, DEVICES, PP = (int(os.environ.get(name, usual)) for name, usual in (("LAYERS", 8), ("DEVICES", 2), ("PP", 1)))
MAKE = """
import sys, torch, transformers
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=32000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=int(sys.argv[2]),
    num_attention_heads=12, num_key_value_heads=4,
)
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[1], max_shard_size="400MB")
"""


def memory() -> int:
    """The bytes that this process has to itself, without the memory-mapped pages of files."""
    return 1024 * int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1])


@contextmanager
def peak() -> Iterator[dict[str, float]]:
    """Measures by how much memory rises at most inside the ``with`` block, and the seconds it takes."""
    found, ended, before, start = {"rise": 0.0}, threading.Event(), memory(), time.perf_counter()

    def watch() -> None:
        while not ended.wait(0.002):
            found["rise"] = max(found["rise"], memory() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found["rise"] = max(found["rise"], memory() - before)
        found["seconds"] = time.perf_counter() - start


class Measured(GPTModule):
    """Measures the memory while it builds its model and loads the weights."""

    def configure_model(self) -> None:
        if len(self.chunks):
            return
        with peak() as self.loading:
            super().configure_model()


def main() -> None:
    folder = Path(os.environ.setdefault("PRETRAINED_BENCHMARK", tempfile.mkdtemp()))
    if not (folder / "model").is_dir():
        subprocess.run([sys.executable, "-c", MAKE, folder / "model", str(LAYERS)], check=True, stderr=subprocess.PIPE)
    trainer = Trainer(
        accelerator="cpu", devices=DEVICES, strategy=MegatronStrategy(tp=DEVICES // PP, pp=PP), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Measured.from_pretrained(folder / "model")
    trainer.predict(module, [])
    with peak() as saving:
        module.save_pretrained(folder / "out")
    own = sum(p.numel() * p.element_size() for p in module.parameters())
    largest = 4 * module.config.vocab_size * module.config.hidden_size
    report = [
        f"rank {trainer.global_rank}: own weights {own / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB;"
        f" load: +{module.loading['rise'] / 1e6:.0f} MB, {module.loading['rise'] / (own + largest):.2f} of both,"
        f" {module.loading['seconds']:.1f} s; save: +{saving['rise'] / 1e6:.0f} MB,"
        f" {saving['rise'] / largest:.2f} of the largest tensor, {saving['seconds']:.1f} s"
    ]
    reports = [report] * DEVICES
    torch.distributed.all_gather_object(reports, report)
    if trainer.is_global_zero:
        print("\n".join(line for lines in reports for line in lines))
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
