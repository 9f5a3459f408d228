"""The code of docs/bert.md runs."""

import re
from pathlib import Path

from tests.parallel_bert import loader
from tests.parallel_gpt import Layout
from tests.plain_bert import CONFIGS, samples
from tests.ranks import run_ranks
from tests.test_training import trainer

PAGE = Path(__file__).parents[1] / "docs" / "bert.md"


def _run(folder: str) -> dict:
    import os

    os.chdir(folder)
    train, subclass = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {"__name__": "__main__"}
    exec(compile(train, "train_bert.py", "exec"), names)
    exec(compile(subclass, "classifier.py", "exec"), names)
    layout = Layout(pp=2)
    run = trainer(layout, max_epochs=1)
    run.fit(names["Classifier"](CONFIGS["classes"]), loader(samples("classes", 12, 1), layout, 12, run))
    return {
        "logits": names["logits"],
        "steps": names["trainer"].global_step,
        "f1": float(run.callback_metrics["f1"]),
    }


def test_the_page(tmp_path):
    for seen in run_ranks(2, _run, str(tmp_path)):
        assert seen["logits"].shape == (2, 12, 21)
        assert seen["logits"].softmax(-1).amax(-1).mean() > 0.3  # 1/21 knows nothing
        assert seen["steps"] == 16
        assert 0 <= seen["f1"] <= 1
