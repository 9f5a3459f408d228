"""Trains ``plain_t5``'s models under the strategy, and says what to compare."""

from typing import Any

from lightning_megatron import T5Module
from tests.reference import plain_t5
from tests.reference.from_truth import FromTruth, predict_and_train
from tests.reference.plain_gpt import Weights
from tests.support.layout import Layout


class LoadedT5(FromTruth, T5Module):
    """Starts from the truth's weights."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(plain_t5.CONFIGS[name], **options)
        self.truth = name

    def initial_weights(self) -> Weights:
        return plain_t5.megatron_weights(plain_t5.new_model(self.truth))


def train(
    name: str,
    layout: Layout,
    rows: int,
    steps: int,
    full: Weights,
    total: int | None = None,
    terms: dict[str, float] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Predict the first batch, then train on the first ``total`` samples, on this rank."""
    samples = plain_t5.samples(name, rows, steps)[:total]
    return predict_and_train(LoadedT5(name, **(terms or {})), samples, layout, rows, steps, full, **options)
