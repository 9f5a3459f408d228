"""Floating-point operations a second that a device can do: from its data sheet, or measured where no table has it."""

from __future__ import annotations

import re
import time

import torch
import torch.distributed as dist
from lightning.fabric.utilities.throughput import get_available_flops

# Dense (not sparse) TFLOP/s of the tensor cores in bf16 and fp16, from NVIDIA's data sheets, by what
# torch.cuda.get_device_name says. Lightning 2.6 knows no Blackwell and no H200, and the sparse rate of H100 NVL.
_DENSE_16_BIT = {
    r"GB[23]00": 2500.0,
    r"B[23]00": 2250.0,
    r"H[12]00 NVL": 835.5,
    r"H100 PCIe": 756.0,
    r"GH200|H[128]00": 989.4,
    r"H20": 148.0,
}
_MEASURED_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the product that measures an unknown device


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that a device has, or where no table has it, that a product reaches.

    Args:
        device: The device of this rank.
        dtype: Type of the factors.
    """
    known = known_peak_flops(device, dtype)
    return _measured(device, dtype) if known is None else known


def known_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations a second by the data sheet, without sparsity; None where no table has the device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if dtype in (torch.bfloat16, torch.float16):
        for pattern, tflops in _DENSE_16_BIT.items():
            if re.search(rf"\b({pattern})\b", name):
                return tflops * 1e12
    found = get_available_flops(device, dtype)
    return float(found) if found else None


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of five products of square matrices, over all ranks."""
    size = _MEASURED_SIZE.get(device.type, 1024)
    matrix = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.monotonic()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.monotonic() - start)
    ours = torch.tensor([2 * size**3 / best], dtype=torch.float64, device=device)
    dist.all_reduce(ours, op=dist.ReduceOp.MAX)  # ranks that measure at once take turns on a shared CPU
    return float(ours)
