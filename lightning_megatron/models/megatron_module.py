"""``MegatronModule``: a LightningModule whose model is built in pieces, one or more to a pipeline stage."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, Self, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

from lightning_megatron.checkpoint import local_path, without_trainer
from lightning_megatron.distributed import parameter_names, process_group_backends, process_groups
from lightning_megatron.distributed.device import model_rng, use_device
from lightning_megatron.distributed.layout import LayoutError, ParallelLayout
from lightning_megatron.models.build_settings import BuildSettings
from lightning_megatron.models.gpt.rope_scaling import move_rotary
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
    """Whether it bears the mark of ``on_all_stages``."""
    return getattr(step, "on_all_stages", False)


class MegatronModule(pl.LightningModule):
    """The base of the adapters; a subclass changes one thing at a time.

    Per micro-batch and model chunk, ``training_step`` asks ``get_batch`` for the model's inputs, runs the chunk, and on
    the last stage asks ``loss`` for a sum and a token count. The strategy calls it; see ``docs/architecture.md``.

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
        self.settings: BuildSettings | None = None
        self.built_for: BuildSettings | None = None
        self._pads = True
        self._fill: Callable[[Any], None] | None = None  # gives a built model its first weights
        self.chunks = torch.nn.ModuleList()
        self.active_chunk = 0  # set by the strategy before each call: which virtual stage runs
        self.in_pipeline = False  # set by the strategy: whether stages are in the midst of their micro-batches

    # What a subclass changes

    @abstractmethod
    def build_model(self, pre_process: bool, post_process: bool, vp_stage: int | None) -> torch.nn.Module:
        """Build one chunk of the model.

        Args:
            pre_process: Whether the chunk holds the embedding.
            post_process: Whether it holds the output layer.
            vp_stage: Its number on this pipeline stage under interleaving, else None.
        """

    @abstractmethod
    def get_batch(self, batch: Batch) -> Batch:
        """Turn one micro-batch, as the loader gave it, into keyword arguments of the model."""

    @abstractmethod
    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """The loss of one micro-batch, on the last stage.

        Args:
            output: What the last chunk returned.
            batch: What ``get_batch`` returned.

        Returns:
            The sum over tokens and their number, which the strategy weighs by; or a plain mean.
        """

    @abstractmethod
    def check_batch(self, batch: Batch) -> None:
        """Refuse a batch that the model cannot take, before any step is run on it.

        Raises:
            ValueError: Says what is wrong, the values seen and what to change.
        """

    @abstractmethod
    def sequence_length(self, batch: Batch) -> int:
        """Length of the hidden states that travel between pipeline stages, before any sharding."""

    def lengths(self, batch: Batch) -> tuple[int, ...]:
        """Tokens of a sequence of the batch; of an encoder-decoder, of the encoder's side and the decoder's."""
        return (self.sequence_length(batch),)

    def adapt_model(self) -> None:
        """Change the chunks, which are built and have no weights of a checkpoint's yet."""

    def fill_model(self) -> None:
        """Give the built chunks the first weights that this module was told of."""
        if self._fill is not None:
            self._fill(self)

    def connect_data(self, data: Any) -> None:
        """Take from the data module, or None, what the model leaves to it; called before anything is built."""

    def complete_layout(self, layout: ParallelLayout) -> ParallelLayout:
        """Add to the sizes what only the model knows: of an encoder-decoder, the split of its pipeline.

        Raises:
            LayoutError: A split was asked for, and the model has nothing to split; or the split does not fit it.
        """
        if layout.pipeline_split_rank is not None:
            raise LayoutError(
                f"MegatronStrategy(pipeline_split_rank={layout.pipeline_split_rank}) splits the pipeline of"
                f" encoder-decoder models, and {type(self).__name__} is none. Leave it out."
            )
        return layout

    def complete_batch(self, batch: Any) -> Any:
        """Add to this replica's batch, which is on the device, what only the whole global batch says."""
        return batch

    def check_layout(self, layout: ParallelLayout) -> None:
        """Refuse sizes that ``layout`` cannot divide; called before a process group exists.

        Raises:
            LayoutError: With the nearest sizes that work.
        """

    def configure_optimizers(self) -> Any:
        """The optimizer and, where there is one, the scheduler, as plain torch objects."""
        if isinstance(self.optimizer, ParameterGroups):
            optimizer = self.optimizer.build(self.named_shards())
        else:
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            every = process_groups.gather_from_stages(len(trained))
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

    # What Lightning and the strategy call

    def configure_model(self) -> None:
        """Build this rank's chunks, once."""
        if len(self.chunks):
            self._check_built_for(self.build_settings)
            return
        self.built_for = self.build_settings
        layout = self.build_settings.layout
        stage = self._pipeline_stage
        for virtual in range(layout.vp or 1):
            first = stage == 0 and virtual == 0
            last = stage == layout.pp - 1 and virtual == (layout.vp or 1) - 1
            with model_rng(), self.build_settings.device:
                self.chunks.append(self.build_model(first, last, virtual if layout.vp else None))
        with self.build_settings.device:
            self.adapt_model()
        with torch.device("cpu"):  # files are read there
            self.fill_model()

    def build(
        self, tp: int = 1, pp: int = 1, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Build the model outside of a Trainer, on the ranks that torchrun has started, or on this process alone.

        It has the weights that ``from_pretrained`` or ``load_weights`` were told of, or new ones. Ranks beyond
        ``tp · pp`` hold further copies.

        Args:
            tp: Tensor-parallel size.
            pp: Pipeline-parallel size.
            device: By default this rank's GPU, or the CPU where there is none.
            dtype: Type of the weights.

        Returns:
            The module, in eval mode.

        Raises:
            RuntimeError: It is built already.
            LayoutError: The sizes do not fit the number of ranks, or the model.
        """
        if len(self.chunks):
            raise RuntimeError(f"{type(self).__name__}.build: it is built already, for {self.built_for}.")
        self.connect_data(None)
        place = process_groups.default_device() if device is None else torch.device(device)
        use_device(place)
        process_group_backends.init_for_build(place)
        layout = self.complete_layout(ParallelLayout(world_size=process_groups.world_size(), tp=tp, pp=pp))
        self.check_layout(layout)
        process_groups.build(layout)
        process_groups.seed(torch.initial_seed())
        self.settings = BuildSettings(layout=layout, params_dtype=dtype, device=place)
        self.configure_model()
        return self.to(place, dtype).eval()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        move_rotary(self)
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        """One micro-batch through the active chunk: the loss on the last stage, hidden states before it."""
        return self._chunk_step(batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """As ``training_step``, without gradients."""
        return self._chunk_step(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """As ``validation_step``."""
        return self._chunk_step(batch)

    def log_loss(self, stage: str, loss: torch.Tensor, weight: float) -> None:
        """Log ``{stage}_loss``, called on every rank with the loss of the whole global batch.

        Args:
            stage: "train", "val" or "test".
            loss: The same scalar on every rank.
            weight: Its tokens over all replicas, by which Lightning weighs the batches of an evaluation.
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

    def load_weights(self, path: Any, strict: bool = True) -> Self:
        """Start from the weights of a checkpoint that any layout wrote, and from nothing else of it.

        Call it before ``fit``; each rank reads its shards when the model is built.

        Args:
            path: A checkpoint's directory.
            strict: Whether every weight must be in both. With False what differs (a task's head) starts as it would
                have, and is listed.

        Returns:
            The module.

        Raises:
            CheckpointError: The checkpoint is not whole, or damaged.
            RuntimeError: The model is built already.
        """
        if len(self.chunks):
            raise RuntimeError(
                f"{type(self).__name__}.load_weights comes too late: the model is built. Call it on a new"
                f" {type(self).__name__}, before fit."
            )
        fill = partial(without_trainer.fill, path=without_trainer.verified(local_path(path)), strict=strict)
        before = None if strict else self._fill  # what the checkpoint lacks starts as it would have
        self._fill = fill if before is None else partial(_after_pending_saves, fills=[before, fill])
        return self

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make the module of a checkpoint of any layout on this process alone: the whole model, in fp32.

        Args:
            checkpoint_path: A checkpoint's directory.
            map_location: The device; the CPU by default.
            hparams_file: Refused: the checkpoint has the arguments.
            strict: Whether every weight must be in both. None: as the module's ``strict_loading``.
            weights_only: False trusts the checkpoint and unpickles arguments that are no plain data.
            **kwargs: Arguments of ``__init__`` that were not saved (the optimizer), or are to differ.
        """
        if hparams_file is not None:
            raise TypeError(f"{cls.__name__}.load_from_checkpoint takes no hparams_file; name the arguments.")
        path = local_path(checkpoint_path)
        module = without_trainer.construct(cls, path, weights_only is False, kwargs)
        module._fill = partial(
            without_trainer.fill, path=path, strict=module.strict_loading if strict is None else strict
        )
        return module.build_alone("cpu" if map_location is None else map_location).train()

    def build_alone(self, device: torch.device | str | None = None) -> Self:
        """As ``build``, of the whole model; refused on a rank of a run, whose groups it would replace.

        Raises:
            RuntimeError: This process is a rank of a larger run.
        """
        process_groups.check_single_process()
        return self.build(device=device)

    # What is the same for all

    @property
    def build_settings(self) -> BuildSettings:
        """What the strategy said of the run; an error before ``MegatronStrategy`` has set it."""
        if self.settings is None:
            raise RuntimeError(
                f"{type(self).__name__} builds its model under a Trainer with strategy=MegatronStrategy(...), once the"
                " processes have started; another strategy has no process groups for it. Without a Trainer, call"
                f" {type(self).__name__}.build(tp=..., pp=...)."
            )
        return self.settings

    def named_shards(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters, shards as they are, under the unsharded model's names."""
        for chunk in self.chunks:
            yield from parameter_names.named_shards(chunk)

    @override
    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters; those of the model's chunks under the unsharded model's names, as ``named_shards``.

        So a condition on names holds for the same weights under every layout: layers are numbered through all pipeline
        stages and virtual stages, and the last stage's copy of a tied embedding is called as the embedding is. The keys
        of ``state_dict()`` are those of this rank's own tree.
        """
        start = f"{prefix}." if prefix else ""
        for name, parameter in super().named_parameters("", recurse, remove_duplicate):
            room, _, rest = name.partition(".")
            if room == "chunks":
                number, _, rest = rest.partition(".")
                name = parameter_names.whole_name(self.chunks[int(number)], rest)
            yield start + name, parameter

    @property
    def active_model(self) -> torch.nn.Module:
        """The chunk that the strategy is running."""
        return self.chunks[self.active_chunk]

    @property
    def on_last_stage(self) -> bool:
        """Whether the active chunk gives the model's output."""
        return bool(self.active_model.post_process)

    def lacks_loss(self, output: Any) -> bool:
        """Whether ``output`` is a dict without a loss, from the chunk that should have given one."""
        return self.on_last_stage and isinstance(output, Mapping) and "loss" not in output

    def _check_built_for(self, settings: BuildSettings) -> None:
        if self.built_for != settings:
            raise ValueError(
                f"This {type(self).__name__} was built for {self.built_for}, and this run has {settings}. Make a new"
                f" {type(self).__name__}, and carry the weights over in a checkpoint (ckpt_path=)."
            )

    @property
    def _pipeline_stage(self) -> int:
        return process_groups.coordinates().pp

    def _padding(self, length: int) -> int:
        """Tokens to add so that sequence parallelism can share the sequence out."""
        layout = self.build_settings.layout
        return -length % layout.tp if layout.uses_sequence_parallel and self._pads else 0

    def _chunk_step(self, batch: Batch) -> Any:
        inputs = self.get_batch(batch)
        output = self.active_model(**inputs)
        return self.loss(output, inputs) if self.on_last_stage else output


def _after_pending_saves(module: Any, fills: list[Callable[[Any], None]]) -> None:
    for fill in fills:
        fill(module)


def _when_to_step(scheduler: Any) -> dict[str, Any]:
    """Lightning's dictionary: once per optimizer step, but per epoch where a metric is waited for."""
    given = scheduler if isinstance(scheduler, dict) else {"scheduler": scheduler}
    if isinstance(given["scheduler"], ReduceLROnPlateau):
        return {"interval": "epoch", "monitor": "val_loss", **given}
    return {"interval": "step", **given}
