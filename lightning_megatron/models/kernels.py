"""``Kernels``: which implementations compute the layers and the loss; none of them changes what is computed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch

from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments

ExpertDispatch = Literal["alltoall", "allgather"]
AttentionKernel = Literal["flash", "cudnn", "efficient", "math", "flex"]


@answer_wrong_names
@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Which implementations compute the layers and the loss. All give the same results, up to rounding.

    None chooses what was measured to be fastest on the device of the run.

    Args:
        fused_layers: Whether ``torch.compile`` joins the operations between the matrix products of a layer: bias,
            activation, dropout, residual, norm and rotary positions. None: on a GPU. The first step compiles them,
            and the next run finds them on disk, in ``TORCHINDUCTOR_CACHE_DIR``. Where torch cannot compile, they run
            one by one, with a warning. In bf16 a joined operation rounds once. It is ignored by
            ``layers="transformer_engine"``, which has such kernels of its own.
        chunked_loss: Whether the output layer and the cross-entropy are computed in chunks of tokens, so that the
            logits of all tokens never exist at once. With ``fused_layers``, ``torch.compile`` joins the operations on
            a chunk's logits. ``predict`` and generation give logits either way, and so does a BERT's or a T5's model to
            an own ``loss``.
        fused_weight_gradients: Whether the matrix product that is a weight's gradient adds it to the gradient buffer
            itself, in fp32. Where that is not possible or not faster, the gradient is computed first and added then:
            under ``overlap_grad_reduce``, for a weight with a gradient hook, and on the CPU for bf16 weights with an
            fp32 buffer.
        attention: The kernel of the core attention, by the name of torch's back end ("flash", "cudnn", "efficient" or
            "math"), or "flex" for torch's FlexAttention. None chooses by the shape: on CUDA, cuDNN's on Hopper and
            torch's own order elsewhere, and FlexAttention for documents, windows and padding, which the others
            compute with a mask of queries and keys; on the CPU, torch's own, in pieces for documents and windows.
        expert_dispatch: How tokens reach experts on other ranks. "alltoall": each rank sends each token to the ranks of
            its experts. "allgather": all ranks get all tokens, which takes fewer messages and more memory. None:
            "alltoall".

    Raises:
        ValueError: A value that is none of these.
    """

    fused_layers: bool | None = None
    chunked_loss: bool | None = None
    fused_weight_gradients: bool | None = None
    attention: AttentionKernel | None = None
    expert_dispatch: ExpertDispatch | None = None

    def __post_init__(self) -> None:
        arguments = Arguments(type(self).__name__)
        flags = {name: getattr(self, name) for name in ("fused_layers", "chunked_loss", "fused_weight_gradients")}
        arguments.flag(optional=True, **flags)
        arguments.one_of((None, "flash", "cudnn", "efficient", "math", "flex"), attention=self.attention)
        arguments.one_of((None, "alltoall", "allgather"), expert_dispatch=self.expert_dispatch)

    def on(self, device: torch.device) -> Self:
        """The kernels of a run on ``device``: where a flag is None, the one that is faster there.

        Raises:
            ValueError: A kernel that the device does not have.
        """
        if device.type != "cuda" and self.attention in ("cudnn", "efficient", "flex"):
            raise ValueError(
                f"Kernels(attention={self.attention!r}) trains on CUDA only, and this run is on {device.type!r}. Leave"
                " it out there, or use 'flash' or 'math'."
            )
        chosen: dict[str, Any] = _FASTER_ON_CUDA if device.type == "cuda" else _FASTER_ON_CPU
        return replace(self, **{f.name: chosen[f.name] for f in fields(self) if getattr(self, f.name) is None})


_FASTER_ON_CPU: dict[str, Any] = {
    "fused_layers": False,
    "chunked_loss": False,
    "fused_weight_gradients": True,
    "attention": None,  # by the shape
    "expert_dispatch": "alltoall",
}
_FASTER_ON_CUDA: dict[str, Any] = {
    "fused_layers": True,
    "chunked_loss": True,
    "fused_weight_gradients": True,
    "attention": None,
    "expert_dispatch": "alltoall",
}
