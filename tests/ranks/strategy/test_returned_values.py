"""What the steps of an adapter return is, on every stage, what one step on the whole batch would have returned."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, default_collate

from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.lightning_runs import CONFIG, OurGPT, trainer_of
from tests.support.ranks import run_ranks

ROWS = 8  # batches of four; under pp=2 four micro-batches of one row each


@dataclass
class Guess:
    first: torch.Tensor
    names: list[str]


# of the numbers of a batch's rows and their logits
KINDS: dict[str, Any] = {
    "dict without loss": lambda numbers, logits: {"names": _names(numbers), "first": logits[:, 0], "of": "GPT"},
    "list of texts": lambda numbers, logits: _names(numbers),
    "None": lambda numbers, logits: None,
    "text": lambda numbers, logits: "done",
    "numpy": lambda numbers, logits: logits[:, 0].numpy(),
    "dataclass": lambda numbers, logits: Guess(logits[:, 0], _names(numbers)),
    "tuple": lambda numbers, logits: (logits[:, 0], numbers),
    "numbers, one a row": lambda numbers, logits: logits[:, 0, 0],
    "two numbers a row": lambda numbers, logits: (logits[:, 0, 0], numbers.float()),
    "tensors, one a row": lambda numbers, logits: [logits[i, 0, : 3 + n] for i, n in enumerate(numbers)],
}


def _names(numbers: torch.Tensor) -> list[str]:
    return [f"row {number}" for number in numbers.tolist()]


class Returns(OurGPT):
    """Returns something else than Lightning's loss, whatever the stage."""

    kind = ""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        numbers = batch["number"].tolist()
        assert batch["names"] == tuple(_names(batch["number"]))
        assert batch["array"].tolist() == numbers
        assert [len(x) for x in batch["ragged"]] == [n + 1 for n in numbers]
        output = super().predict_step(batch, batch_idx)
        return KINDS[self.kind](batch["number"], output.detach())

    validation_step = test_step = predict_step


class Learns(OurGPT):
    """Returns guesses beside the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "numbers": batch["number"]} if self.on_last_stage else loss


class NoLoss(OurGPT):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"numbers": batch["number"], "output": super().training_step(batch, batch_idx)}


class Told(Callback):
    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def on_validation_batch_end(self, trainer, module, outputs, *_: Any) -> None:
        self.outputs.append(outputs)

    on_test_batch_end = on_train_batch_end = on_validation_batch_end


def _collated(samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """A batch of tensors, and of other containers whose rows are cut with theirs."""
    batch: dict[str, Any] = default_collate(samples)
    batch["names"] = tuple(_names(batch["number"]))
    batch["array"] = batch["number"].numpy()
    batch["ragged"] = [torch.zeros(n + 1) for n in batch["number"].tolist()]
    return batch


def _data() -> DataLoader:
    return DataLoader(
        Rows({**text_samples(CONFIG, ROWS), "number": torch.arange(ROWS)}), batch_size=4, collate_fn=_collated
    )


def _returned(layouts: list[Layout]) -> list[dict[str, Any]]:
    return [_of_layout(layout) for layout in layouts]


def _of_layout(layout: Layout) -> dict[str, Any]:
    module, results = Returns(CONFIG), {}
    for kind in KINDS:
        module.kind = kind
        predicted = trainer_of(layout, ".").predict(module, _data())
        told = Told()
        run = trainer_of(layout, ".", callbacks=[told])
        [metrics] = run.validate(module, _data(), verbose=False)
        run.test(module, _data(), verbose=False)
        results[kind] = (predicted, told.outputs if layout.dp == 1 else predicted * 2)
        assert metrics == {}, "there is no loss to log"
    told = Told()
    trainer_of(layout, ".", callbacks=[told], max_steps=1).fit(Learns(CONFIG), _data())
    assert sorted(told.outputs[0]) == ["loss", "numbers"]
    results["trained"] = sorted(told.outputs[0]["numbers"].tolist()) if layout.dp == 1 else None
    with pytest.raises(MisconfigurationException, match="'loss'"):
        trainer_of(Layout(), ".", max_steps=1).fit(NoLoss(CONFIG), _data()) if layout == Layout() else _fail()
    return results


def _fail() -> None:
    raise MisconfigurationException("'loss'")


def _like(mine: Any, other: Any) -> None:
    assert type(mine) is type(other)
    if isinstance(other, dict):
        assert list(mine) == list(other)
        mine, other = list(mine.values()), list(other.values())
    if isinstance(other, Guess):
        mine, other = [mine.first, mine.names], [other.first, other.names]
    if isinstance(other, list | tuple):
        assert len(mine) == len(other)
        for one, two in zip(mine, other, strict=True):
            _like(one, two)
    elif other is None or isinstance(other, str):
        assert mine == other
    else:  # sums of another order
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(other), rtol=1e-4, atol=1e-5)


def test_the_same_on_all_stages_and_replicas_as_on_one_rank():
    [[whole]] = run_ranks(1, _returned, [Layout()])
    first, second = whole["dict without loss"][0]
    assert first["names"] + second["names"] == [f"row {n}" for n in range(ROWS)]
    assert whole["dict without loss"][1] is not None
    for rank in run_ranks(2, _returned, [Layout(pp=2), Layout(dp=2), Layout(pp=2, vp=2)]):
        for results in rank:
            assert results.pop("trained") in (whole["trained"], None)
            for kind, returned in results.items():
                _like(returned, whole[kind])
