"""The pages for a reader with a question: a model that is too big, a run with DDP, no memory left, an error text."""

import ast
import re

import pytest
import torch

from lightning_megatron import GPTConfig, Kernels, ParallelLayout
from lightning_megatron.strategy import out_of_memory
from tests.support.pages import DOCS, ROOT, blocks, names_of, shell


def test_the_tables_of_layouts_are_the_estimates(tmp_path, capsys):
    names_of("too_big.md", tmp_path)
    page = (DOCS / "too_big.md").read_text()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 12
    for rows in (printed[:6], printed[6:]):  # all weights, and LoRA
        assert "\n".join(["|---|---|---|---|---|---|", *rows, ""]) in page


def test_the_table_of_plain_modules_is_adams_and_the_distributed_optimizers():
    page = (DOCS / "too_big.md").read_text()
    rows = re.findall(r"^\| (\d) \| (\d+) \| (\d+) GB \|$", page, re.MULTILINE)
    assert [(int(gpus), int(size)) for gpus, size, _ in rows] == [(n, 8 + 8 // n) for n in (1, 2, 4, 8)]
    assert all(size == gigabytes for _, size, gigabytes in rows)


@pytest.mark.slow
def test_ddp_and_this_strategy_end_with_the_same_loss(tmp_path):
    (code,) = blocks("from_ddp.md")
    (commands,) = blocks("from_ddp.md", "bash")
    (tmp_path / "train.py").write_text(code)
    told = dict(re.findall(r"^(ddp|megatron): ([\d.]+)$", shell(tmp_path, commands), re.MULTILINE))
    assert float(told["megatron"]) == pytest.approx(float(told["ddp"]), rel=1e-6)


def test_the_message_of_a_run_without_memory(tmp_path, capsys):
    """The page's example is the note that such a run ends with."""
    names = names_of("out_of_memory.md", tmp_path)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    training = {"micro_batch_size": 4, "precision": "bf16-mixed", "recompute": None, "device": "cuda"}
    training |= {"distributed_optimizer": True, "kernels": Kernels()}
    assert isinstance(names["config"], GPTConfig)
    out_of_memory.explain(error, names["config"], ParallelLayout(world_size=8, tp=2), **training)
    (message,) = blocks("out_of_memory.md", "text")
    assert message == "\n".join(error.__notes__) + "\n"
    before, after = re.findall(r"^total +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert before in message
    assert float(after) < float(before)


def texts(source: str) -> list[str]:
    """The texts of a file, with … where it puts values in."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value.replace("{}", "…"))
    return found


def test_each_error_text_is_one_of_ours():
    page = (DOCS / "troubleshooting.md").read_text()
    headings = re.findall(r"^### (`.+`)( \(\w+\))?", page, re.MULTILINE)
    quoted = [(quote, whose) for heading, whose in headings for quote in re.findall(r"`([^`]+)`", heading)]
    assert len(quoted) > 50
    ours = [text for file in (ROOT / "lightning_megatron").rglob("*.py") for text in texts(file.read_text())]
    for quote, whose in quoted:
        if not whose:
            pattern = re.compile(".*".join(re.escape(part.strip()) for part in quote.split("…")), re.DOTALL)
            assert any(pattern.search(text) for text in ours), quote
