"""The run of docs/chat.md trains a small model on conversations."""

import json

import transformers

from tests.reference import pretrained
from tests.support.chats import CHATS, tokenizer
from tests.support.pages import blocks, shell


def test_the_page(tmp_path):
    (code,) = blocks("chat.md", "yaml")
    own = tokenizer()
    own.save_pretrained(tmp_path / "model")
    config = {**pretrained._GROUPED, "vocab_size": len(own)}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS * 4))
    small = code.replace("Qwen/Qwen2.5-0.5B-Instruct", "model").replace("2048", "128").replace("epochs: 3", "epochs: 1")
    assert small.count("128") == 2
    (tmp_path / "chat.yaml").write_text(f"{small}    cache_dir: cache\n")
    shell(
        tmp_path,
        "lightning-megatron fit --config chat.yaml --trainer.logger CSVLogger --trainer.logger.save_dir logs "
        "--trainer.log_every_n_steps 1",
    )
    rows = next((tmp_path / "logs").rglob("metrics.csv")).read_text().splitlines()
    assert any("val_loss" in row for row in rows[:1])
    assert len(rows) > 3
