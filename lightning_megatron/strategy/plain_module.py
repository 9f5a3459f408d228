"""Makes a plain LightningModule the model chunk that the engine runs, and refuses what cannot be done with one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig

from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.megatron_module import MegatronModule

# Hooks in which a module may make its layers, once process groups exist.
_BUILDING_HOOKS = ("configure_model", "configure_sharded_model", "setup")


# Behind the size that does work.
_WHAT_HELPS = ", which makes every rank a data-parallel replica, or build it from parallel layers: docs/own_model.md."


class PlainModel(torch.nn.Module):
    """A plain LightningModule as the only model chunk of a schedule without pipeline stages."""

    def __init__(self, module: pl.LightningModule, layout: ParallelLayout) -> None:
        super().__init__()
        self.module = module
        # The schedules ask a transformer's configuration for switches that are off here, but for sequence parallelism,
        # by which the gradients of weights marked with it are summed; of the sizes, nothing is read.
        self.config = TransformerConfig(
            num_layers=1,
            hidden_size=layout.tp,
            num_attention_heads=layout.tp,
            calculate_per_token_loss=True,
            tensor_model_parallel_size=layout.tp,
            sequence_parallel=layout.uses_sequence_parallel,
        )
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, _: Any) -> None:
        """Do nothing: there is no earlier stage."""


def check_layout(module: pl.LightningModule, layout: ParallelLayout) -> None:
    """Refuse sizes that do nothing for a plain LightningModule, before a process group exists.

    A module that makes its layers in a hook that comes later is checked then, by ``check_parallel_layers``.

    Raises:
        LayoutError: Pipeline stages, or sequences shared by ranks; or tensor or sequence parallelism without parallel
            layers.
    """
    if layout.cp > 1:
        raise layout.error(
            f"{type(module).__name__} is a plain LightningModule, whose sequences {layout.cp} ranks cannot share: its"
            " attention would see a part of each. Use cp=1, or GPTModule, BertModule, T5Module, AutoModule or a"
            " MegatronModule of your own, as docs/own_model.md shows."
        )
    if layout.pp > 1:
        raise layout.error(
            f"{type(module).__name__} is a plain LightningModule, which cannot be cut into {layout.pp} pipeline stages."
            f" Use pp=1{_WHAT_HELPS}"
        )
    if not any(is_overridden(hook, module) for hook in _BUILDING_HOOKS):
        check_parallel_layers(module, layout)


def check_arguments(arguments: tuple[Any, ...], strategy: Any) -> None:
    """Refuse a module among the arguments of ``trainer.fit`` that several ranks cannot train, before one is started.

    Args:
        arguments: The arguments.
        strategy: The strategy, whose precision and layout the module is to have.

    Raises:
        LayoutError: A plain LightningModule cannot have the layout.
        MisconfigurationException: The module cannot have the precision.
    """
    for module in arguments:
        if isinstance(module, pl.LightningModule):
            strategy.precision_plugin.check_module(module, single_rank=False)
            if not isinstance(module, MegatronModule):
                check_layout(module, strategy.layout)


def check_parallel_layers(module: pl.LightningModule, layout: ParallelLayout) -> None:
    """Refuse tensor and sequence parallelism for a plain LightningModule, which is built, without parallel layers.

    megatron-core marks the weights that tensor-parallel ranks share; without such a weight, each rank would train the
    whole model on the same batches.

    Raises:
        LayoutError: There are several tensor-parallel ranks, or sequence parallelism, and no parallel layer.
    """
    marked = any(getattr(parameter, "tensor_model_parallel", False) for parameter in module.parameters())
    if marked or not (layout.tp > 1 or layout.sequence_parallel):
        return
    would, use = "sequence_parallel=True would do nothing", "sequence_parallel=False"
    if layout.tp > 1:
        would = f"each of the {layout.tp} tensor-parallel ranks would train all of it on the same batches"
        use = "tp=1, sequence_parallel=False" if layout.sequence_parallel else "tp=1"
    raise layout.error(
        f"{type(module).__name__} is a plain LightningModule without parallel layers: {would}. Use {use}{_WHAT_HELPS}"
    )


def check_output(output: Any) -> None:
    """Refuse an output of ``training_step`` that Lightning refuses too; None is refused by the caller.

    Raises:
        MisconfigurationException: It is not a loss of one number.
        RuntimeError: The loss does not require a gradient.
    """
    try:
        ClosureResult.from_training_step_output(output)
    except MisconfigurationException as error:
        what = (
            f"a dict with {sorted(map(str, output))}" if isinstance(output, Mapping) else f"a {type(output).__name__}"
        )
        raise MisconfigurationException(
            f"{error} Here training_step returned {what}. Return the loss, a tensor, or a dict with the key 'loss'."
        ) from error
    loss = output["loss"] if isinstance(output, Mapping) else output
    if loss is None:
        return
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise RuntimeError(
            "training_step returned a loss that does not require grad: nothing would be learned from it. Leave out"
            " .detach() and torch.no_grad() on its way from the parameters."
        )
    if loss.numel() != 1:
        raise MisconfigurationException(
            f"training_step returned a loss of shape {list(loss.shape)}. Return one number, such as loss.mean()."
        )
