"""``Perplexity``: the exponential of a mean loss over tokens."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments


@answer_wrong_names
class Perplexity(pl.Callback):
    """Logs ``val_perplexity`` and ``test_perplexity``, over all tokens of the whole set, alike on every rank.

    Args:
        loss: Name of the logged loss without ``val_`` or ``test_``; a BERT's is ``mlm_loss``.
    """

    def __init__(self, loss: str = "loss") -> None:
        Arguments("Perplexity").kind(str, "the name of a logged metric", loss=loss)
        self.loss = loss

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer, pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """The mean is Lightning's, weighed by tokens; of several loaders each has its own.

        Raises:
            MisconfigurationException: Nothing of that name is logged.
        """
        name = f"{stage}_{self.loss}"
        metrics = trainer.callback_metrics
        found = {key: value for key, value in metrics.items() if key.partition("/dataloader_idx_")[0] == name}
        if not found:
            raise MisconfigurationException(
                f"Perplexity(loss={self.loss!r}) needs {name!r}, which is not among what was logged:"
                f" {', '.join(sorted(metrics)) or 'nothing'}."
            )
        for key, value in found.items():
            module.log(
                key.replace(name, f"{stage}_perplexity").replace("/", "_"),
                torch.exp(value.double()).float(),
                prog_bar=True,
                rank_zero_only=False,
            )
