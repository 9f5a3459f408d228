"""A batch carries answers about its own tensors only, row by row."""

import torch

from lightning_megatron.models.host_answers import answers, sealed, trusted, with_answers
from lightning_megatron.training.batch_rows import count_rows, take_rows


def is_even(batch):
    return batch["x"][:, 0] % 2 == 0


def batch_on_device():
    loaded = {"x": torch.tensor([[0], [1], [2]]), "none": None, "scale": 2.0}
    answered = with_answers(loaded, [is_even])
    assert "host_answers" not in loaded
    return sealed({name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in answered.items()})


def carried(batch):
    """What the batch itself knows: the question would not know its answer."""

    def is_even(_):
        raise LookupError

    return answers(trusted(batch), is_even)


def test_micro_batches_carry_the_answers_of_their_rows():
    batch = batch_on_device()
    assert count_rows(batch) == 3
    assert carried(batch) == [True, False, True]
    assert carried(take_rows(batch, 1, 3, 3)) == [False, True]


def test_what_changed_on_the_way_is_asked_again():
    changed, replaced, added, inside = (batch_on_device() for _ in range(4))
    changed["x"] += 1
    replaced["x"] = replaced["x"] + 1
    added["mask"] = torch.ones(3)
    part = take_rows(inside, 1, 3, 3)
    part["x"][0] = 4
    for batch in (changed, replaced, added, part):
        assert trusted(batch).keys() == batch.keys() - {"host_answers"}
    assert answers(trusted(changed), is_even) == [False, True, False]
    assert answers(trusted(part), is_even) == [True, True]


def test_an_unsealed_batch_is_not_trusted():
    batch = with_answers({"x": torch.tensor([[0]])}, [is_even])
    assert "host_answers" not in trusted(dict(batch))


def test_tensors_of_inference_mode_can_be_sealed():
    with torch.inference_mode():
        assert carried(batch_on_device()) == [True, False, True]
