"""Silences warnings of megatron-core that nobody who trains with it can act on."""

from __future__ import annotations

import logging
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
# Of megatron-core's loggers, by the module.
_IGNORED_RECORDS = {
    "models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # from 0.19 on; docs/compatibility.md says what follows from it
    # From 0.18 on: the layout that it asks for is the one that it then makes itself.
    "distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}


def ignore_known_warnings() -> None:
    """Ignore the warnings; called once, before megatron-core is imported. Filters that the user sets later win."""
    for category, message in _IGNORED:
        warnings.filterwarnings("ignore", message=message, category=category)
    for module, beginning in _IGNORED_RECORDS.items():
        logging.getLogger(f"megatron.core.{module}").addFilter(_Unless(beginning))


class _Unless(logging.Filter):
    """Lets all records of a logger through but those that begin with these words."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)
