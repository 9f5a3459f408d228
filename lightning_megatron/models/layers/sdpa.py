"""Chooses the back end of ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from lightning_megatron.models.layers.equal_heads import equal_heads
from lightning_megatron.models.layers.partial_attention import attend_behind

# Takes queries, keys and values [b, heads, s, head], a mask as torch has it, and whether no query looks ahead.
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, bool], torch.Tensor]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MASKLESS = ("flash", "cudnn")  # they compute plain causal attention, or attention to all keys
_CUDNN_FIRST = [BACKENDS[name] for name in ("cudnn", "flash", "efficient", "math")]
_CUDNN_HEAD = 128  # largest head that cuDNN trains on every Hopper
_CUDNN_SHAPES = 8  # cuDNN plans each new shape for about a second: lengths that change all the time are not for it

_planned: set[tuple[int, ...]] = set()


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    *,
    dropout: float,
    scale: float | None,
    backend: str | None,
) -> torch.Tensor:
    """Attention of ``query`` ``[b, heads, s, head]`` to ``key`` and ``value`` ``[b, groups, s, head]``.

    Args:
        query: The queries.
        key: The keys.
        value: The values, whose heads may be of another size; the result's are of theirs.
        mask: As torch has it: True where a query looks, or numbers that are added to the scores.
        causal: Whether no query looks ahead, the last of which is at the last key; then there is no mask.
        dropout: Probability.
        scale: Factor on the scores; None is one over the root of the head's size.
        backend: A name of ``BACKENDS``. None: cuDNN's on Hopper, where it is 1.7 to 2.3 times as fast as the others
            (transformers' pull request 48163), and torch's own order elsewhere.

    Raises:
        ValueError: The back end that was asked for cannot take these tensors.
    """
    width = value.size(-1)
    if width != query.size(-1) and backend != "math" and (query.device.type == "cpu" or backend == "flash"):
        (query, key, value), scale = equal_heads(query, key, value, scale)  # else the CPU makes all scores
        found = attend(query, key, value, mask, causal, dropout=dropout, scale=scale, backend=backend)
        return found[..., :width]
    if causal and query.size(2) != key.size(2):
        return _attend_behind(query, key, value, dropout, scale, backend)
    call = functools.partial(
        F.scaled_dot_product_attention,
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.size(1) != key.size(1),
    )
    if backend is not None:
        with sdpa_kernel(BACKENDS[backend]):
            try:
                return call()
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                with warnings.catch_warnings(record=True) as reasons:
                    warnings.simplefilter("always")
                    try:
                        return call()
                    except RuntimeError:
                        _refuse(backend, query, key, mask, dropout, [str(reason.message) for reason in reasons])
    if mask is None and _is_for_cudnn(query, key):
        with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
            return call()
    return call()


def _attend_behind(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scale: float | None,
    backend: str | None,
) -> torch.Tensor:
    """Causal attention where keys lie before the first query, as in a part of a row; CUDA's kernels know of that."""
    if query.device.type == "cpu" and not dropout and backend != "math":
        return attend_behind(query, key, value, scale)
    # On a CPU, torch makes the scores of all heads where there is dropout, so that a mask adds little.
    behind = causal_lower_right(query.size(2), key.size(2))
    mask = behind._materialize(query.device) if query.device.type == "cpu" else behind
    grouped = query.size(1) != key.size(1)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale, enable_gqa=grouped)


def _is_for_cudnn(query: torch.Tensor, key: torch.Tensor) -> bool:
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if query.size(-1) > _CUDNN_HEAD or not _is_hopper(query.device.index or 0):
        return False
    if query.size(2) != key.size(2):  # a text that is written, whose keys are more with each token
        return False
    shape = (*query.shape, *key.shape)
    if shape not in _planned and len(_planned) < _CUDNN_SHAPES:
        _planned.add(shape)
    return shape in _planned


@functools.cache
def _is_hopper(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def _refuse(
    backend: str, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, dropout: float, reasons: list[str]
) -> NoReturn:
    what = f"{query.dtype} on {query.device.type!r}, {query.size(1)} heads of {query.size(-1)}, {key.size(1)} of keys"
    masked = "no mask" if mask is None else f"a mask {tuple(mask.shape)}"
    texts = [text.partition(" (Triggered")[0] for text in reasons]
    because = next((text for text in texts if not text.endswith("because:")), "")
    raise ValueError(
        f"Kernels(attention={backend!r}): torch's back end of this name cannot take {what}, with {masked} and dropout"
        f" {dropout}.{' torch says: ' + because if because else ''} Leave attention out, so that one that can is chosen"
        " (documents, windows and padding have a mask; 'efficient' and 'math' take any)."
    )
