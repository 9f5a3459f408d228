"""Sorts what torch's profiler has seen by the kind of kernel: products, attention, element-wise work, copies."""

import re
from collections import Counter
from typing import Any

import torch
from torch.autograd import DeviceType

# The first that matches; names of CUDA kernels, and of ATen's operators on the CPU.
KINDS = {
    "attention": r"flash|fmha|attention|sdpa|_mha_",
    "optimizer": r"adam|multi_tensor|foreach",
    "compiled (fused element-wise work and sums)": r"^triton_|cpp_fused|inductor",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|^aten::(mm|addmm|bmm|baddbmm|matmul|linear)$",
    "norms": r"layer_?norm|rms_?norm",
    "softmax and cross-entropy": r"softmax|nll_loss|cross_entropy",
    "concatenation": r"CatArray|::cat$",
    "embedding and indexing": r"embedding|index|gather|scatter",
    "copies, casts and zeros": r"copy|memcpy|memset|fill|zero",
    "sums": r"reduce_kernel|::(sum|mean|max|amax|norm|linalg_vector_norm)$",
    "communication": r"nccl|gloo|c10d",
    "element-wise": r"elementwise|::(mul|add|sub|div|exp|gelu|silu|sigmoid|where|pow|tanh|neg|sqrt|eq|ge|lt)",
}


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def shares(profiler: torch.profiler.profile, seconds: float, cuda: bool) -> dict[str, float]:
    """Each kind's share of the seconds that were profiled, largest first; on a GPU, the rest is "idle"."""
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        spent[kind_of(event.key)] += _seconds(event, cuda)
    found = {kind: each / seconds for kind, each in spent.most_common() if each}
    if cuda:
        found["idle"] = 1 - sum(found.values())
    return found


def _seconds(event: Any, cuda: bool) -> float:
    """Of the kernels alone on a GPU; of an operator itself, without those that it calls, on the CPU."""
    if cuda:
        return event.self_device_time_total / 1e6 if event.device_type == DeviceType.CUDA else 0.0
    return event.self_cpu_time_total / 1e6 if event.key.startswith(("aten::", "graph_", "cpp_fused")) else 0.0


def table(found: dict[str, float]) -> str:
    """The shares as lines of text."""
    return "\n".join(f"    {share:6.1%}  {kind}" for kind, share in found.items())
