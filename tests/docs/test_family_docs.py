"""The code of docs/bert.md, docs/heads.md, docs/question_answering.md and docs/t5.md runs."""

from dataclasses import replace

import torch
import transformers

from lightning_megatron import BertConfig, ParallelLayout
from tests.reference.plain_bert import CONFIGS, samples
from tests.support.layout import Layout
from tests.support.pages import blocks, names_of, script
from tests.support.ranks import run_ranks
from tests.support.trainer import loader, trainer


def _bert(folder: str) -> dict:
    names, layout = names_of("bert.md", folder), Layout(pp=2)
    classifying = trainer(layout, max_epochs=1)
    rows = loader(samples("classes", 12, 1), layout, 12, classifying)
    classifying.fit(names["Classifier"](CONFIGS["classes"]), rows)
    return {
        "logits": names["logits"],
        "steps": names["trainer"].global_step,
        "f1": float(classifying.callback_metrics["f1"]),
        "modern_bert": _parameters(names["config"]),
    }


def _parameters(config: BertConfig) -> int:
    one, unpadded = ParallelLayout(world_size=1), replace(config, make_vocab_size_divisible_by=1)
    return unpadded.parameters(one, unpadded.chunks(one)[0])


def test_bert(tmp_path):
    for seen in run_ranks(2, _bert, str(tmp_path)):
        assert seen["logits"].shape == (2, 12, 21)
        assert seen["logits"].softmax(-1).amax(-1).mean() > 0.3  # 1/21 knows nothing
        assert seen["steps"] == 16
        assert 0 <= seen["f1"] <= 1
        assert seen["modern_bert"] == 149_655_232


KEEP = """
if __name__ == "__main__":
    torch.save({"scores": scores, "reward": trainer.callback_metrics["train_loss"]}, f"seen-{trainer.global_rank}.pt")
"""


def test_heads(tmp_path):
    script(tmp_path, "\n\n".join(blocks("heads.md")) + KEEP)
    seen = torch.load(tmp_path / "seen-0.pt")
    assert seen["scores"].argmax(1).tolist() == [number % 2 for number in range(32)]
    assert seen["reward"] < 0.3  # log 2 knows nothing
    assert (tmp_path / "adapter/adapter_config.json").is_file()
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    ids = torch.stack([torch.full((16,), 1 + number % 2) for number in range(32)])
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, seen["scores"], rtol=0, atol=1e-4)


def _answers(folder: str) -> dict:
    names = names_of("question_answering.md", folder)
    return {name: float(value) for name, value in names["metric"].compute().items()}


def test_answers(tmp_path):
    for seen in run_ranks(2, _answers, str(tmp_path)):
        assert seen["exact_match"] > 90
        assert seen["f1"] > 90


def _t5(folder: str) -> dict:
    names = names_of("t5.md", folder)
    return {"logits": names["logits"], "steps": names["trainer"].global_step}


def test_t5(tmp_path):
    for seen in run_ranks(2, _t5, str(tmp_path)):
        assert seen["logits"].shape == (2, 6, 20)
        assert seen["logits"].softmax(-1).amax(-1).mean() > 0.07  # 1/20 knows nothing; the page has no seed
        assert seen["steps"] == 24
