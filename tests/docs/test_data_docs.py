"""The code of docs/data.md runs."""

import shlex
from pathlib import Path

import pytest

from lightning_megatron.cli.main import main
from lightning_megatron.data.indexed.files import open_indexed
from lightning_megatron.data.tokenizers import train_bpe
from tests.support.pages import blocks, names_of
from tests.support.ranks import run_ranks


def _page(folder: str) -> dict:
    names = names_of("data.md", folder)
    return {
        "steps": names["trainer"].global_step,
        "loss": float(names["trainer"].callback_metrics["train_loss"]),
        "bert": {name: tuple(value.shape) for name, value in names["bert_batch"].items()},
        "t5": names["t5_batch"],
    }


def test_python(tmp_path):
    for seen in run_ranks(2, _page, str(tmp_path)):
        assert seen["steps"] == 20
        assert seen["loss"] < 4.5  # 5.55 knows nothing
        assert set(seen["bert"]) == {"input_ids", "attention_mask", "labels", "token_type_ids", "next_sentence_label"}
        assert (seen["t5"]["labels"][:, 0] == 99).all()


def test_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    for n in range(8):
        Path("corpus", f"{n}.txt").write_text(f"One sentence, number {n}. And another one! " * 9)
    Path("more.jsonl").write_text('{"text": "A row."}\n')
    train_bpe(list(Path("corpus").iterdir()), 300, "tokenizer.json")
    (block,) = blocks("data.md", "bash")
    for line in block.strip().splitlines():
        command, *arguments = shlex.split(line)
        assert command == "lightning-megatron"
        main(arguments)
    whole, sentences = open_indexed("data/gpt"), open_indexed("data/sentences")
    assert len(whole) == 9
    assert len(sentences) == pytest.approx(8 * 18)
    assert Path("data/sentences.tokenizer.json").is_file()
