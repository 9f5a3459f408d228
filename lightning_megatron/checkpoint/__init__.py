"""Checkpoints: sharded, atomic, asynchronous, for any layout. ``docs/checkpoints.md`` says what is promised.

A checkpoint is a directory::

    manifest.json    sizes and checksums of all files, the layout, versions; written last
    trainer.pt       Lightning's state: loops, callbacks, schedules, hyper-parameters; plain data
    objects.pt       what of it is no plain data, if anything: a pickle, read only when trusted
    ranks/00000.pt   random states and loaders of each rank; plain data
    weights/         weights, moments and main weights: a torch_dist checkpoint of megatron-core

That of a plain LightningModule on one rank is Lightning's own file instead.

Imports ``distributed`` and ``training``.
"""

from typing import TYPE_CHECKING

from lightning_megatron.distributed.first_use import import_at_first_use

if TYPE_CHECKING:
    from lightning_megatron.checkpoint.checkpointer import Checkpointer, Run
    from lightning_megatron.checkpoint.checkpointing import Checkpointing
    from lightning_megatron.checkpoint.manifest import CheckpointError, newest
    from lightning_megatron.checkpoint.model_checkpoint import check_folders
    from lightning_megatron.checkpoint.paths import local_path
    from lightning_megatron.checkpoint.plain_classes import formerly_in, plain_class

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "Checkpointing",
    "Run",
    "check_folders",
    "local_path",
    "newest",
    "formerly_in",
    "plain_class",
]

__getattr__ = import_at_first_use(
    __name__,
    {
        "checkpointer": ["Checkpointer", "Run"],
        "checkpointing": ["Checkpointing"],
        "manifest": ["CheckpointError", "newest"],
        "model_checkpoint": ["check_folders"],
        "paths": ["local_path"],
        "plain_classes": ["formerly_in", "plain_class"],
    },
)
