"""Trains ``plain_bert``'s models under the strategy, and says what to compare."""

from typing import Any

from lightning_megatron import BertModule
from tests.reference import plain_bert
from tests.reference.from_truth import FromTruth, predict_and_train
from tests.reference.plain_gpt import Weights
from tests.support.layout import Layout


class LoadedBert(FromTruth, BertModule):
    """Starts from the truth's weights."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(plain_bert.CONFIGS[name], **options)
        self.truth = name

    def initial_weights(self) -> Weights:
        return plain_bert.megatron_weights(plain_bert.new_model(self.truth))


def train(
    name: str,
    layout: Layout,
    rows: int,
    steps: int,
    full: Weights,
    terms: dict[str, float] | None = None,
    **strategy: Any,
) -> dict[str, Any]:
    """Predict the first batch, then train, on this rank."""
    samples = plain_bert.samples(name, rows, steps)
    return predict_and_train(LoadedBert(name, **(terms or {})), samples, layout, rows, steps, full, **strategy)
