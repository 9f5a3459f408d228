"""``MegatronModule``: the steps, loss and optimizer of a model that is built as chunks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from megatron.core.transformer import TransformerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_megatron.distributed import collectives, process_groups
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.distributed.model_fit import check_model
from lightning_megatron.models import model_needs
from lightning_megatron.models.building import ChunkedModule
from lightning_megatron.models.host_answers import Answers
from lightning_megatron.models.model_config import ModelConfig
from lightning_megatron.models.weight_init import FirstWeights
from lightning_megatron.training.lr_schedule import LRSchedule
from lightning_megatron.training.parameter_groups import OptimizerCallable, ParameterGroups, default_optimizer

LossReduction = Literal["token", "micro_batch"]
# Also returns a ReduceLROnPlateau, or Lightning's dictionary of a scheduler and when to step it.
SchedulerCallable = Callable[[Optimizer], LRScheduler]
Batch = dict[str, torch.Tensor]
IGNORED_LABEL = -100  # transformers' convention; torch's too
# A sum over tokens and their number, or a plain mean.
Loss = tuple[torch.Tensor, torch.Tensor] | torch.Tensor


H = TypeVar("H", bound=Callable[..., Any])


def on_all_stages(step: H) -> H:
    """Mark a ``predict_step`` that is called once a batch, with all of it, on all pipeline stages at the same time.

    Unmarked, it is called for each micro-batch and chunk, as the schedule comes to it. ``generate`` needs the mark.
    """
    step.on_all_stages = True  # type: ignore[attr-defined]
    return step


def runs_on_all_stages(step: Callable[..., Any]) -> bool:
    """Whether a step is marked with ``on_all_stages``."""
    return getattr(step, "on_all_stages", False)


class MegatronModule(ChunkedModule):
    """The base of all modules here, and of a module with a model of your own.

    A model of your own needs ``build_model`` and ``loss``, with pipeline stages ``sequence_length`` too, and mostly
    ``get_batch``; ``docs/own_model.md`` shows two.

    Per micro-batch and model chunk, ``training_step`` asks ``get_batch`` for the model's inputs, pads them with
    ``pad_inputs``, runs the chunk, and on the last stage asks ``loss`` for a sum and a token count. The strategy calls
    it; see ``docs/architecture.md``.

    Args:
        optimizer: Makes the torch optimizer from the parameters, or ``ParameterGroups`` with conditions for weight
            decay and learning rates. The default is ``default_optimizer``.
        lr_schedule: Megatron's schedule as ``LRSchedule``; or makes a torch (or transformers) scheduler from that
            optimizer, stepped once per optimizer step. ``ReduceLROnPlateau`` follows ``val_loss``, per epoch. For other
            intervals and metrics, return Lightning's dictionary (``scheduler``, ``interval``, ``monitor``, ...).
        loss_reduction: "token": every token of the global batch counts once, whatever the micro-batches, replicas and
            accumulated batches. "micro_batch": Megatron's mean over micro-batches of their means.
    """

    def __init__(
        self,
        optimizer: ParameterGroups | OptimizerCallable | None = None,
        lr_schedule: LRSchedule | SchedulerCallable | None = None,
        loss_reduction: LossReduction = "token",
    ) -> None:
        super().__init__()
        if loss_reduction not in ("token", "micro_batch"):
            raise ValueError(f"loss_reduction={loss_reduction!r}: use 'token' or 'micro_batch'.")
        if optimizer is not None and not callable(optimizer) and not hasattr(optimizer, "build"):
            raise TypeError(
                f"optimizer={optimizer!r} cannot make an optimizer: use a function of the parameters, such as"
                " lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)."
            )
        self.optimizer = optimizer or default_optimizer
        self.lr_schedule = lr_schedule
        self.loss_reduction = loss_reduction
        self.micro_batch_share = 1.0  # set by the strategy: the micro-batch's share of the batch's rows; 0 of padding
        self.in_pipeline = False  # set by the strategy: whether stages are in the midst of their micro-batches
        self._first_weights: list[FirstWeights] = []  # of the configurations that transformer_config made

    # What a subclass changes

    def get_batch(self, batch: Any) -> Batch:
        """Turn one micro-batch, as the loader gave it, into keyword arguments of the model; a dict is them already.

        Raises:
            TypeError: The batch is no mapping.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"{type(self).__name__} calls its model with the batch's entries as keyword arguments, and this batch"
                f" is a {type(batch).__name__}. Let the dataset return dicts, such as {{'images': x, 'labels': y}}, or"
                " override get_batch(batch), which returns such a dict."
            )
        return dict(batch)

    def pad_inputs(self, inputs: Batch, multiple: int) -> Batch:
        """Pad the inputs of one micro-batch, so that sequence and context parallelism can divide the sequence.

        Args:
            inputs: The inputs that ``get_batch`` returned.
            multiple: The padded sequence's length is a multiple of this.

        Returns:
            The inputs; here as they are.
        """
        return inputs

    def shard_inputs(self, inputs: Batch) -> Batch:
        """Keep this rank's part of each sequence, which context parallelism divides; asked for with cp > 1 only.

        What runs along the sequence is divided by ``SequenceShards.here(zigzag=...).take(tensor, dim)``; a mask or a
        pattern of attention stays that of whole rows.

        Args:
            inputs: The padded inputs of one micro-batch; their length is a multiple of 2 · cp.

        Returns:
            The inputs of this rank.
        """
        raise NotImplementedError(f"{type(self).__name__} has no shard_inputs, which cp > 1 needs.")

    @abstractmethod
    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """The loss of one micro-batch, on the last stage.

        Args:
            output: The output of the last chunk.
            batch: The padded inputs that ``get_batch`` returned.

        Returns:
            The sum over tokens and their number, which the strategy weighs by; or a plain mean.
        """

    def check_batch(self, batch: Any) -> None:
        """Refuse a batch that the model cannot take, before any step is run on it; here none.

        Args:
            batch: A batch of the loader's, on the host.

        Raises:
            ValueError: Says what is wrong, the values seen and what to change.
        """

    @abstractmethod
    def sequence_length(self, batch: Batch) -> int:
        """Length of the hidden states that travel between pipeline stages, before any sharding.

        Args:
            batch: One micro-batch, as the loader gave it.
        """

    def lengths(self, batch: Batch) -> tuple[int, ...]:
        """Tokens of one sequence, padding included; an encoder-decoder has two numbers: encoder and decoder.

        A model without ``sequence_length`` has none, and ``Throughput`` then counts samples only.

        Args:
            batch: A batch that has run, as the loader gave it.
        """
        has_sequences = type(self).sequence_length is not MegatronModule.sequence_length
        return (self.sequence_length(batch),) if has_sequences else ()

    def answer_on_host(self, batch: Any) -> Answers:
        """What the values of a batch, which is still on the host, decide, so that no step asks the device."""
        return {}

    def complete_batch(self, batch: Any) -> Any:
        """Add to this replica's batch, which is on the device, what only the whole global batch says."""
        return batch

    def configure_optimizers(self) -> Any:
        """The optimizer and, where there is one, the scheduler, as plain torch objects."""
        if isinstance(self.optimizer, ParameterGroups):
            optimizer = self.optimizer.build(self.named_shards())
        else:
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            every = collectives.gather_from_stages(len(trained))
            if not all(every):
                raise MisconfigurationException(
                    f"{type(self).__name__}: pipeline stage {every.index(0)} of {len(every)} has no parameter to train"
                    f" (the stages have {every}). Freeze less, use pp=1, or another split of the layers."
                )
            optimizer = self.optimizer(parameter for parameter in trained)
        if self.lr_schedule is None:
            return optimizer
        if isinstance(self.lr_schedule, LRSchedule):
            scheduler: Any = self.lr_schedule.build(optimizer, self.trainer)
        else:
            scheduler = self.lr_schedule(optimizer)
        return [optimizer], [_when_to_step(scheduler)]

    # What a model of your own is built with

    def transformer_config(
        self,
        *,
        hidden_size: int,
        num_layers: int | None = None,
        num_attention_heads: int | None = None,
        experts: Any = None,
        **fields: Any,
    ) -> TransformerConfig:
        """megatron-core's configuration for ``build_model``: your sizes, and what follows from the run.

        The weights that megatron-core's layers draw, and those that you draw with ``config.init_method(weight)``, are
        the same under every layout.

        Args:
            hidden_size: Width of the hidden states.
            num_layers: Layers of the whole model. None: one for each chunk, or as many as ``layers_per_stage`` has.
            num_attention_heads: Heads of the whole model. None: as few as can be shared out.
            experts: ``Experts``, the settings of each ``ExpertLayer(config)``; which layers have one is yours. None:
                there is none.
            **fields: ``ffn_hidden_size``, ``activation``, ``hidden_dropout`` and the like, as ``GPTConfig`` has them;
                and any field of megatron-core's ``TransformerConfig``.

        Raises:
            LayoutError: Sizes that the run's layout cannot divide.
            ValueError: No such field; or a value is wrong.
        """
        settings = self.build_settings
        tp, cut = settings.layout.tp, settings.layout.layers_per_stage
        stages = sum(cut) if isinstance(cut, tuple) else settings.layout.num_stages
        fewest_heads = 1 if hidden_size % tp else tp
        config = ModelConfig.of_own_model(
            hidden_size=hidden_size,
            num_layers=stages if num_layers is None else num_layers,
            num_attention_heads=fewest_heads if num_attention_heads is None else num_attention_heads,
            **fields,
        )
        sizes = config.sizes()
        mixture = None if experts is None else experts.sizes(sizes["ffn_hidden_size"])
        check_model(config.complete_layout(settings.layout), **sizes, experts=mixture)
        of_experts = {} if experts is None else experts.megatron_arguments(config.num_layers, sizes["ffn_hidden_size"])
        made = config.transformer_config(settings, **of_experts)
        made.experts = experts
        made.fused_layers = settings.kernels.fused_layers is True  # ModelChunk.transformer_block reads it
        self._first_weights.append(FirstWeights(made))
        return made

    def draw_weights(self) -> None:
        """Draw the first weights that ``transformer_config`` has made the layers leave to this."""
        rows = getattr(getattr(self, "config", None), "vocab_size", None)
        for weights in self._first_weights:
            for chunk in self.chunks:
                weights.draw(chunk, process_groups.run_seed(), rows)
        self._first_weights = []

    def check_layout(self, layout: ParallelLayout) -> None:
        """Refuse sizes that ``layout`` cannot divide, and a module without a method that the run calls.

        Raises:
            LayoutError: The sizes do not fit.
            MisconfigurationException: Methods are missing; the message lists all of them.
        """
        model_needs.check_methods(self, (ChunkedModule, MegatronModule), layout)

    # What Lightning and the strategy call

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        """One micro-batch through the active chunk: the loss on the last stage, hidden states before it."""
        return self._chunk_step(batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Run one micro-batch through the active chunk, without gradients."""
        return self._chunk_step(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Run one micro-batch through the active chunk, without gradients."""
        return self._chunk_step(batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Run one micro-batch through the active chunk; what the last one gives, rows first, is the prediction."""
        return self.active_model(**self._fitted(self.get_batch(batch)))

    def log_loss(self, stage: str, loss: torch.Tensor, weight: torch.Tensor) -> None:
        """Log ``{stage}_loss``, called on every rank with the loss of the whole global batch.

        Args:
            stage: "train", "val" or "test".
            loss: The same scalar on every rank.
            weight: Number of its tokens over all replicas, by which Lightning weighs the batches of an evaluation; a
                scalar, which is on the device as the loss is.
        """
        training = stage == "train"
        self.log(
            f"{stage}_loss",
            loss,
            prog_bar=True,
            on_step=training,
            on_epoch=not training,
            sync_dist=not training,  # it is equal everywhere; Lightning warns of evaluations that do not say so
            batch_size=weight,  # type: ignore[arg-type]
        )

    # What is the same for all

    def lacks_loss(self, output: Any) -> bool:
        """Whether ``output`` is a dict without a loss, from the chunk that should have given one."""
        return self.on_last_stage and isinstance(output, Mapping) and "loss" not in output

    @property
    def _length_multiple(self) -> int:
        """What the length of a sequence is a multiple of, so that sequence and context parallelism can divide it."""
        layout = self.build_settings.layout
        parts = layout.tp if layout.uses_sequence_parallel else 1
        return parts * 2 * layout.cp if layout.cp > 1 else parts

    def _fitted(self, inputs: Batch) -> Batch:
        """The inputs that ``get_batch`` returned, as the active chunk of this rank takes them."""
        padded = self.pad_inputs(inputs, self._length_multiple)
        return self.shard_inputs(padded) if self.build_settings.layout.cp > 1 else padded

    def _chunk_step(self, batch: Batch) -> Any:
        inputs = self._fitted(self.get_batch(batch))
        output = self.active_model(**inputs)
        if not self.on_last_stage:
            return output
        loss = self.loss(output, inputs)
        if isinstance(loss, torch.Tensor):
            self._refuse_mean_beside_experts()
        return loss

    def _refuse_mean_beside_experts(self) -> None:
        """Refuse a loss without its number of tokens where routers of experts have losses, which are weighed by it."""
        experts = getattr(self.chunks[0].config, "experts", None)
        if experts is not None and experts.has_losses and self.training and self.loss_reduction == "token":
            raise TypeError(
                f"{type(self).__name__}.loss returned a plain mean, and Experts(balancing={experts.balancing!r}) has"
                " losses that are weighed by tokens. Return the sum over tokens and their number; a GPTModule may use"
                " loss_reduction='micro_batch' instead."
            )

    def forward(self, **inputs: Any) -> Any:
        """What the model gives for the arguments that ``get_batch`` returns, where it is whole on the rank.

        Raises:
            RuntimeError: The model has pipeline stages; ``trainer.predict`` gives it under every layout.
        """
        self._check_callable()
        return self.active_model(**self._fitted(inputs))

    def _check_callable(self) -> None:
        """Build a model that is not built; refuse to call one that has pipeline stages."""
        if not len(self.chunks) and self._trainer is None:
            self.build_alone()
        if self.build_settings.layout.pp > 1:
            raise RuntimeError(
                f"{type(self).__name__}.forward needs pp=1: here are pipeline stages. Use trainer.predict."
            )


def _when_to_step(scheduler: Any) -> dict[str, Any]:
    """Lightning's dictionary: once per optimizer step, but per epoch where a metric is waited for."""
    given = scheduler if isinstance(scheduler, dict) else {"scheduler": scheduler}
    if isinstance(given["scheduler"], ReduceLROnPlateau):
        return {"interval": "epoch", "monitor": "val_loss", **given}
    return {"interval": "step", **given}
