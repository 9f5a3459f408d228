"""What the host has answered about a batch counts for its own tensors only, row by row."""

import torch

from lightning_megatron.models.host_answers import answers, ask, remember, with_answers
from lightning_megatron.training.batch_rows import take_rows


def is_even(batch):
    return batch["x"][:, 0] % 2 == 0


def batch_on_device():
    loaded = {"x": torch.tensor([[0, 0], [1, 0], [2, 0]]), "scale": torch.tensor(2.0), "name": "a"}
    moved = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in loaded.items()}
    remember(moved, ask(loaded, [is_even]))
    return moved


def known(batch):
    """What the host has answered: the question would not know its answer."""

    def is_even(_):
        raise LookupError

    return answers(with_answers(batch), is_even)


def is_known(batch):
    return with_answers(batch)["host_answers"] != {}


def test_micro_batches_have_the_answers_of_their_rows():
    batch = batch_on_device()
    assert known(batch) == [True, False, True]
    assert known(take_rows(batch, 1, 3, 3)) == [False, True]
    assert known(take_rows(batch, 2, 3, 3)) == [True]


def test_a_batch_has_nothing_beside_what_its_loader_gave():
    assert batch_on_device().keys() == {"x", "scale", "name"}


def test_what_changed_on_the_way_is_asked_again():
    changed = batch_on_device()
    changed["x"] += 1
    assert not is_known(changed)
    assert answers(with_answers(changed), is_even) == [False, True, False]
    replaced = batch_on_device()
    assert not is_known({**replaced, "x": replaced["x"] + 1})
    assert not is_known({**replaced, "mask": torch.ones(3)})
    assert not is_known({**replaced, "x": replaced["x"][:, :1]})
    assert not is_known({**replaced, "x": replaced["x"][[0, 1, 2]]})
    assert not is_known({**replaced, "scale": torch.tensor(2.0)})
    assert is_known(replaced)
    part = take_rows(batch_on_device(), 1, 3, 3)
    part["x"][0] = 4
    assert answers(with_answers(part), is_even) == [True, True]


def test_another_batch_is_asked():
    first = batch_on_device()
    batch_on_device()
    assert not is_known(first)
    remember(first, {})
    assert not is_known(first)


def test_rows_of_two_kinds_are_asked():
    batch = {"x": torch.tensor([[0], [1], [2]]), "y": torch.tensor([[0], [1], [2]])}
    remember(batch, ask(batch, [is_even]))
    assert known({"x": batch["x"][1:], "y": batch["y"][1:]}) == [False, True]
    assert not is_known({"x": batch["x"][1:], "y": batch["y"][:2]})


def test_tensors_of_inference_mode_have_answers():
    with torch.inference_mode():
        assert known(batch_on_device()) == [True, False, True]
