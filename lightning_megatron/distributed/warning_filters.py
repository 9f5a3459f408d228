"""Silences warnings of megatron-core, and lines of Lightning's, that nobody who trains with this package can act on."""

from __future__ import annotations

import logging
import re
import warnings

_IGNORED = (
    (FutureWarning, r"`torch\.distributed\.\w+_tensor` is deprecated"),  # megatron-core's calls, under torch 2.13
    (UserWarning, r"The \.grad attribute of a Tensor that is not a leaf"),  # its optimizer clears shards' gradients
    (UserWarning, r"When using (async grad allreduce|sequence parallelism) it is recommended"),  # CUDA streams
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
# Of Lightning's loggers, once a Trainer has a MegatronStrategy.
_IGNORED_OF_LIGHTNING = {
    "lightning.pytorch.utilities.rank_zero": (
        "\N{ELECTRIC LIGHT BULB} Tip: ",  # other products
        "TPU available: False",
        "GPU available: False, used: False",  # a GPU that is there and is not used is warned of
        f"{'-' * 100}\ndistributed_backend=",  # strategy/run_line.py says it with the layout
    ),
    "lightning.fabric.utilities.distributed": ("Initializing distributed: ",),
    # Of each save, about an argument that Lightning itself leaves out.
    "lightning.pytorch.trainer.connectors.checkpoint_connector": ("`weights_only` was not set, defaulting to ",),
}
# What every rank says alike, and rank 0 is enough for.
_FOR_RANK_ZERO = {
    "lightning.fabric.utilities.seed": re.compile(r"\[rank: (?!0\])\d+\] Seed set to "),
    "lightning.pytorch.trainer.connectors.signal_connector": re.compile("SLURM auto-requeueing enabled"),
}
_NO_VALIDATION = r"You defined a `validation_step` but have no `val_dataloader`"


def ignore_known_warnings() -> None:
    """Ignore the warnings; called once, before megatron-core is imported. Filters that the user sets later win."""
    logging.getLogger("lightning.fabric.utilities.seed").addFilter(_on_rank_zero)
    for category, message in _IGNORED:
        warnings.filterwarnings("ignore", message=message, category=category)
    for module, beginning in _IGNORED_RECORDS.items():
        logging.getLogger(f"megatron.core.{module}").addFilter(_Unless(beginning))


def ignore_known_lines(rank: int) -> None:
    """Ignore what Lightning says in a run of ``MegatronStrategy``, beside its summary, its bar and its warnings.

    Args:
        rank: The number of this rank.
    """
    for name, beginnings in _IGNORED_OF_LIGHTNING.items():
        logger = logging.getLogger(name)
        if not any(isinstance(found, _Unless) for found in logger.filters):
            logger.addFilter(_Unless(beginnings))
    if rank != 0:
        logging.getLogger("lightning.pytorch.trainer.connectors.signal_connector").addFilter(_on_rank_zero)


def ignore_unused_validation(module: object) -> None:
    """Ignore that there is no validation data where the ``validation_step`` is this package's, not the user's."""
    where = type(module).validation_step.__module__ or ""  # type: ignore[attr-defined]
    if where.startswith(f"{__package__.partition('.')[0]}."):
        warnings.filterwarnings("ignore", message=_NO_VALIDATION)


def _on_rank_zero(record: logging.LogRecord) -> bool:
    return not _FOR_RANK_ZERO[record.name].match(record.getMessage())


class _Unless(logging.Filter):
    """Lets all records of a logger through but those that begin with these words, or with one of several."""

    def __init__(self, beginning: str | tuple[str, ...]) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)
