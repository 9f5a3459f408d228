"""The code of docs/bert.md and docs/t5.md runs."""

from tests.reference.plain_bert import CONFIGS, samples
from tests.support.layout import Layout
from tests.support.pages import names_of
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
    }


def test_bert(tmp_path):
    for seen in run_ranks(2, _bert, str(tmp_path)):
        assert seen["logits"].shape == (2, 12, 21)
        assert seen["logits"].softmax(-1).amax(-1).mean() > 0.3  # 1/21 knows nothing
        assert seen["steps"] == 16
        assert 0 <= seen["f1"] <= 1


def _t5(folder: str) -> dict:
    names = names_of("t5.md", folder)
    return {"logits": names["logits"], "steps": names["trainer"].global_step}


def test_t5(tmp_path):
    for seen in run_ranks(2, _t5, str(tmp_path)):
        assert seen["logits"].shape == (2, 6, 20)
        assert seen["logits"].softmax(-1).amax(-1).mean() > 0.07  # 1/20 knows nothing; the page has no seed
        assert seen["steps"] == 24
