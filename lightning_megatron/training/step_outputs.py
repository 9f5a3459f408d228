"""Separates what the step of a micro-batch gave: what travels on, its loss, and what it returned beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import make_viewless_tensor

from lightning_megatron.training.batch_rows import join_rows


@contextmanager
def outputs_of(model: torch.nn.Module) -> Iterator[list[Any]]:
    """Collect the outputs of a chunk while the step runs it; of the last chunk, nothing is collected."""
    chunk: Any = model.module if isinstance(model, DistributedDataParallel) else model
    given: list[Any] = []
    if getattr(chunk, "post_process", True):
        yield given
        return
    handle = chunk.register_forward_hook(lambda _, __, output: given.append(output))
    try:
        yield given
    finally:
        handle.remove()


def passed_on(output: Any, given: list[Any], device: torch.device) -> torch.Tensor:
    """The tensor that the schedule sends to the next stage: hidden states; on the last stage, an unused one."""
    tensor = output[0] if isinstance(output, tuple) and output else output
    if isinstance(tensor, torch.Tensor) and (not given or tensor.shape == given[-1].shape):
        return tensor
    return given[-1] if given else torch.zeros((), device=device)


def travelling(hidden: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Hidden states as the next stage waits for them: of that shape, with memory of their own, which is freed later.

    Raises:
        ValueError: They have another shape, with which the next stage would wait for ever, or read something else.
    """
    if tuple(hidden.shape) != shape:
        raise ValueError(
            f"This pipeline stage passes hidden states of shape {list(hidden.shape)} on, and the next one waits for"
            f" {list(shape)}: the module's sequence_length (divided by tp under sequence parallelism), the rows of a"
            " micro-batch, and the configuration's hidden_size. Return [s, b, h] from the model, and s from"
            " sequence_length."
        )
    whole = hidden.contiguous()  # as messages have to be
    return make_viewless_tensor(whole, whole.requires_grad, keep_graph=True)


def loss_of(output: Any, may_be_rows: bool) -> tuple[Any, Any]:
    """Separate the result of a step on the last stage into its loss and the rest, each None if there is none.

    Args:
        output: The value that the step returned.
        may_be_rows: Whether a tensor of shape [1] may be the only row of a micro-batch, so that only scalars are
            losses.
    """
    if isinstance(output, Mapping) and "loss" in output:
        loss, rest = output["loss"], {name: value for name, value in output.items() if name != "loss"}
        return loss, rest or None

    def is_number(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.numel() == 1 and not (may_be_rows and value.dim())

    if is_number(output):
        return output, None
    is_sum = isinstance(output, tuple) and len(output) == 2 and not hasattr(output, "_fields")
    if is_sum and is_number(output[0]) and (isinstance(output[1], int | float) or is_number(output[1])):
        return output, None
    return None, output


def joined(extras: list[Any], sizes: list[int]) -> Any:
    """Join what the steps of all micro-batches returned beside losses."""
    if all(extra is None for extra in extras):
        return None
    if all(isinstance(extra, dict) for extra in extras):  # a key that some dicts lack is None there
        names = dict.fromkeys(name for extra in extras for name in extra)
        extras = [{name: extra.get(name) for name in names} for extra in extras]
    return join_rows(extras, sizes)
