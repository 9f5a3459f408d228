"""Answers devices that ``MegatronStrategy`` cannot train on, as the Trainer is given them, and imports little."""

from __future__ import annotations

from lightning_megatron.distributed.suggestions import closest_name

_ACCELERATORS = ("cpu", "gpu", "cuda", "auto")
_DEVICES = ("auto", "-1", "null", "~", "")  # the last three are the parser's to judge
_OTHERS = ("tpu", "xla", "mps", "hpu", "ipu", "npu", "xpu")  # of Lightning, or of packages beside it


def wrong_accelerator(value: str) -> str:
    """What is wrong with an accelerator, and what to use; empty where it may be right, as one of the user's own."""
    if value in _ACCELERATORS:
        return ""
    if value.lower() in _OTHERS:
        return "MegatronStrategy trains on CPU and CUDA devices; use cpu or gpu"
    meant = closest_name(value, _ACCELERATORS, similarity=0.75)
    return f"it is unknown; did you mean {meant}?" if meant else ""


def wrong_devices(value: str) -> str:
    """What is wrong with a number or list of devices, and what to use; empty where it may be right."""
    plain = value.strip().replace(" ", "")
    is_list = "," in plain or (plain.startswith("[") and plain != "[]")
    is_number = plain.isdigit() and int(plain) > 0
    return "" if is_list or is_number or plain in _DEVICES else "use a number from 1, a list of numbers, or auto"
