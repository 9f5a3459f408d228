"""``Checkpointing``: how a run saves its checkpoints, loads them, and goes on from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments
from lightning_megatron.training.resumed_settings import Side


@answer_wrong_names
@dataclass(frozen=True)
class Checkpointing:
    """How a run saves its checkpoints, loads them, and goes on from them: ``MegatronStrategy(checkpointing=)``.

    Args:
        async_save: Write checkpoints while training goes on, which waits only for the copy to host memory.
        on_save_error: What happens when a checkpoint cannot be written, for example on a full disk: "raise" ends the
            run, and "warn" trains on.
        verify_checksums: Check the checksum of every file before a checkpoint is loaded.
        allow_pickle: Unpickle the objects in a checkpoint, which can run any code. Without it a checkpoint that needs
            it is refused; weights, optimizer state, loops and random states are plain data and do not need it.
            ``trainer.fit(weights_only=)`` has no effect, since Lightning 2.6 does not pass it on.
        optimizer_settings: Which learning rates, weight decay, betas, schedules and other settings of the optimizer
            hold after a resume, where the two differ: those of the "checkpoint", as in Lightning, or those of the
            "program". Each difference is reported with both values.
        skip_batches: How many batches to leave out after a resume, for example those of a loss spike that the run was
            rewound to before.
    """

    async_save: bool = False
    on_save_error: Literal["raise", "warn"] = "raise"
    verify_checksums: bool = True
    allow_pickle: bool = False
    optimizer_settings: Side = "checkpoint"
    skip_batches: int = 0

    def __post_init__(self) -> None:
        """Refuse a wrong value.

        Raises:
            MisconfigurationException: An argument is wrong; the message has its name and value.
        """
        arguments = Arguments("Checkpointing", MisconfigurationException)
        arguments.flag(
            async_save=self.async_save, verify_checksums=self.verify_checksums, allow_pickle=self.allow_pickle
        )
        arguments.one_of(("raise", "warn"), on_save_error=self.on_save_error)
        arguments.one_of(("checkpoint", "program"), optimizer_settings=self.optimizer_settings)
        arguments.whole(0, skip_batches=self.skip_batches)
