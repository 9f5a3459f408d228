"""Silences warnings of megatron-core 0.16.1 that nobody who trains with it can act on."""

from __future__ import annotations

import warnings

_IGNORED = (
    (FutureWarning, r"`torch\.distributed\.\w+_tensor` is deprecated"),  # megatron-core's calls, under torch 2.13
    (UserWarning, r"The \.grad attribute of a Tensor that is not a leaf"),  # its optimizer clears shards' gradients
    (UserWarning, r"When using async grad allreduce it is recommended"),  # advice on CUDA streams, at each layer
    (UserWarning, r"full scope is deprecated"),  # of CUDA graphs, which nobody asked for
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),  # Lightning's own, under torch 2.13
    (UserWarning, r"If you are using transformer_engine as the transformer implementation"),  # recomputation: it is not
    (UserWarning, r"(Transformer Engine and )?Apex (is|are) not installed"),
    (DeprecationWarning, r"The following imports from `dynamic_context\.py`"),
    (DeprecationWarning, r"\s*The 'megatron\.core\.transformer\.custom_layers"),
)


def ignore_known_warnings() -> None:
    """Ignore the warnings; called once, before megatron-core is imported. Filters that the user sets later win."""
    for category, message in _IGNORED:
        warnings.filterwarnings("ignore", message=message, category=category)
