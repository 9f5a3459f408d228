"""``ConfiguredModule``: the base of GPT, BERT and T5 modules, which are made from a ``ModelConfig``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import transformers

from lightning_megatron import hf
from lightning_megatron.checkpoint import without_trainer
from lightning_megatron.distributed.layout import ParallelLayout
from lightning_megatron.models.batch_checks import UNMET, given, refuse
from lightning_megatron.models.host_answers import Answers, Question, ask, has_transfer_hooks
from lightning_megatron.models.layers.chunked_cross_entropy import WeightedLabels
from lightning_megatron.models.layers.output_layer import OutputLayer
from lightning_megatron.models.lora import LoRA, lora_module
from lightning_megatron.models.lora.merge import Updates
from lightning_megatron.models.lora.peft_files import Saved
from lightning_megatron.models.lora.peft_files import read as read_adapter
from lightning_megatron.models.loss_terms import LossTerms
from lightning_megatron.models.megatron_module import Batch, LossReduction, MegatronModule, SchedulerCallable
from lightning_megatron.models.model_config import ModelConfig
from lightning_megatron.models.recompute import Recompute
from lightning_megatron.training.lr_schedule import LRSchedule
from lightning_megatron.training.parameter_groups import OptimizerCallable, ParameterGroups

_BY_KIND: dict[str, type[ConfiguredModule]] = {}


class ConfiguredModule(MegatronModule):
    """The base of a family's module. A subclass that declares its ``config_type`` is found by that type's ``kind``.

    Args:
        config: The shape of the model; its class is ``config_type``.
        optimizer: Makes the torch optimizer from the parameters, or ``ParameterGroups``; AdamW by default.
        lr_schedule: ``LRSchedule``, or makes a scheduler from that optimizer; see ``MegatronModule``.
        loss_reduction: "token" or "micro_batch", see ``MegatronModule``.
        lora: Low-rank updates that are trained in place of the weights. None: all weights are trained.
        label_smoothing: Share of each label that training spreads evenly over all token ids, see ``LossTerms``.
        z_loss: Weight of ``(log Z)²`` in the training loss, see ``LossTerms``. Neither changes ``val_loss``.

    Raises:
        TypeError: The configuration is another family's, or none.
        ValueError: A weight of the loss is out of range.
    """

    config_type: ClassVar[type[ModelConfig]]
    _get_batch_of_family: ClassVar[Any] = MegatronModule.get_batch
    _loss_of_family: ClassVar[Any] = MegatronModule.loss
    gives_logits_to_loss: ClassVar[bool] = True  # to an overridden one, else each token's loss

    def __init_subclass__(cls, **options: Any) -> None:
        """Make a family's module known by its kind; a later class with the same kind does not take its place."""
        super().__init_subclass__(**options)
        if "config_type" in vars(cls):
            first = _BY_KIND.setdefault(cls.config_type.kind, cls)
            if (first.__module__, first.__qualname__) == (cls.__module__, cls.__qualname__):
                _BY_KIND[cls.config_type.kind] = cls  # defined again, as when a notebook's cell runs twice

    def __init__(
        self,
        config: ModelConfig,
        optimizer: ParameterGroups | OptimizerCallable | None = None,
        lr_schedule: LRSchedule | SchedulerCallable | None = None,
        loss_reduction: LossReduction = "token",
        lora: LoRA | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(optimizer, lr_schedule, loss_reduction)
        if not isinstance(config, self.config_type):
            wanted = self.config_type.__name__
            raise TypeError(
                f"{type(self).__name__}(config={config!r}): use a {wanted}, such as {wanted}(num_layers=4, ...)."
            )
        self.config = config
        self.lora = lora
        self.loss_terms = LossTerms(label_smoothing, z_loss)
        self.loss_terms.check_range(type(self).__name__)
        self.new_weights: list[str] = []  # of a head that a pretrained model does not have
        self._loaded: Saved | None = None
        self._lengths_of_own: tuple[int, ...] = (0,)  # of the micro-batch that an overridden get_batch made last
        self.save_hyperparameters("config", "loss_reduction", "lora", "label_smoothing", "z_loss", logger=False)

    def connect_data(self, data: Any) -> None:
        """Take from the data module the sizes that the configuration leaves to it."""
        self.config.take_sizes(data)

    def complete_layout(self, layout: ParallelLayout, recompute: Recompute | None = None) -> ParallelLayout:
        """The layout with the layers of each stage; see ``ModelConfig.complete_layout``."""
        complete = self.config.complete_layout(layout, recompute, trains_every_stage=self.lora is not None)
        return super().complete_layout(complete, recompute)

    def check_layout(self, layout: ParallelLayout) -> None:
        """Refuse sizes that the layout cannot divide, updates without a target, and terms of a loss that has none."""
        self.config.check(layout)
        lora_module.check(self)
        self.loss_terms.check(self)

    def adapt_model(self) -> None:
        """Add low-rank updates to the layers, if the module has any."""
        self.loss_terms.check_built(self)
        if self.lora is not None:
            lora_module.inject_updates(self)

    def fill_model(self) -> None:
        """Give the built chunks their first weights, and the low-rank updates of an adapter that was loaded."""
        super().fill_model()
        if self._loaded is not None:
            lora_module.load_updates(self, self._loaded)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | transformers.PreTrainedModel,
        *,
        config: dict[str, Any] | None = None,
        ignore: Sequence[str] = (),
        revision: str | None = None,
        **arguments: Any,
    ) -> Self:
        """A module that starts from a model of transformers; each rank reads its shards when the model is built.

        Args:
            source: A directory (safetensors or ``.bin``, in one file or several; with ``adapter_config.json`` an
                adapter's, which is loaded onto its model), a model in memory, or a name on the Hugging Face hub.
            config: Fields of ``config_type`` that are to differ: ``seq_length``, ``hidden_dropout``, ``task`` and
                ``num_labels``; a head that the source does not have starts anew.
            ignore: Fields of transformers' configuration that change nothing here; "architectures" loads a model of
                another head without that head.
            revision: Branch, tag or commit of a model on the hub.
            **arguments: Further arguments of ``__init__``.

        Raises:
            UnsupportedConfigError: An architecture, a head, or a field of its configuration, without a counterpart.
            ValueError: ``config_type`` has no such field; or a file is damaged.
            WeightsError: Tensors are missing, or have no place in the model.
            FileNotFoundError: There are no such files.
        """
        base, adapter = lora_module.base_and_adapter(source)
        return cls._from_source(hf.open_source(base, revision), config, ignore, arguments, adapter)

    @classmethod
    def _from_source(
        cls,
        source: hf.Source,
        config: dict[str, Any] | None,
        ignore: Sequence[str],
        arguments: dict[str, Any],
        adapter: Path | None,
    ) -> Self:
        if adapter is not None and arguments.get("lora") is not None:
            raise ValueError(
                f"{adapter} is an adapter with its own updates, and lora={arguments['lora']} asks for others. Leave"
                " one out; to start others on the sum of both, merge it with peft (merge_and_unload)."
            )
        cls.config_type.check_names(config or {})
        found = hf.Pretrained.find(source, hf.kind_of(cls.config_type), config or {}, ignore)
        module = cls(config=cls.config_type(**found.arguments()), **arguments)
        found.check(module.config)
        module._fill = found.fill
        module.new_weights = found.new_weights(module.config)
        module.save_hyperparameters(found.origin().hyperparameters(), logger=False)
        lora_module.check(module)
        return module if adapter is None else module.load_adapter(adapter)

    def load_adapter(self, directory: str | Path) -> Self:
        """Start from an adapter that ``peft`` or ``save_adapter`` wrote, and train it further.

        Call it before ``fit``; the sizes are the adapter's, and so are the parts that are trained whole.

        Args:
            directory: The directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

        Returns:
            The module.

        Raises:
            FileNotFoundError: There is no adapter.
            ValueError: The adapter is no LoRA, or belongs to another model.
            RuntimeError: The model is built already.
        """
        if len(self.chunks):
            raise RuntimeError(
                f"{type(self).__name__}.load_adapter comes too late: the model is built. Call it on a new module."
            )
        self._loaded = lora_module.matched(self, read_adapter(Path(directory)))
        self.lora = self._loaded.lora
        self.save_hyperparameters({"lora": self.lora}, logger=False)
        lora_module.check(self)
        return self

    def save_adapter(self, directory: str | Path) -> Path:
        """Write the low-rank updates, and what was trained whole, as ``peft`` loads them; all ranks call this.

        Args:
            directory: The directory to write.

        Returns:
            The directory.

        Raises:
            ValueError: The module has none.
        """
        self._bring_weights_up_to_date()
        return lora_module.save(self, Path(directory))

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        tokenizer: Any = None,
        dtype: torch.dtype | str | None = None,
        max_shard_size: int | str = "5GB",
        family: str | None = None,
    ) -> Path:
        """Write a directory that ``transformers`` loads, from any layout, updates merged; all ranks call this.

        Args:
            directory: The directory to write; weights of an earlier call are replaced.
            tokenizer: A tokenizer of transformers', which is saved too.
            dtype: Type of the weights, such as "bfloat16". None: the type that they were loaded in; of a model that was
                not pretrained, the type that they have.
            max_shard_size: Largest size of a file of weights, such as "1.5GB" or "5GiB"; a larger model has several
                files and an index.
            family: transformers' ``model_type``. None: the one that the module was loaded from, or the first that fits.

        Returns:
            The directory.

        Raises:
            UnsupportedConfigError: The family has no such model.
        """
        origin = hf.Origin.of(self.hparams)
        updates = None if self.lora is None else partial(Updates, self.lora, config=self.config)
        target = hf.Target.choose(self.config, origin, family, dtype, max_shard_size, tokenizer, updates)
        kept = self.__dict__.get("_kept_checkpoint")
        if kept is not None:
            return target.write_checkpoint(Path(directory), without_trainer.verified(kept.path))
        self._bring_weights_up_to_date()
        return target.write_module(Path(directory), self)

    def _bring_weights_up_to_date(self) -> None:
        """Build a model that is not built; what is on its way to the weights of one in training arrives."""
        if not len(self.chunks):
            self.build_alone()
        if self._trainer is not None:
            self.trainer.strategy.lightning_module_state_dict()

    @property
    def has_own_get_batch(self) -> bool:
        """Whether a class of the user's overrides ``get_batch``: then the loader's batches may have any form."""
        return type(self).get_batch is not type(self)._get_batch_of_family

    @property
    def has_own_loss(self) -> bool:
        """Whether a class of the user's overrides ``loss``."""
        return type(self).loss is not type(self)._loss_of_family

    def check_batch(self, batch: Any) -> None:
        """Refuse a batch that the model cannot take; with an overridden ``get_batch``, its inputs are checked instead.

        Raises:
            ValueError: Says what is wrong, the values seen and what to change.
        """
        if not self.has_own_get_batch:
            self._check_loaded(self._named_tensors(batch))

    def answer_on_host(self, batch: Any) -> Answers:
        """Answers to what ``get_batch`` would ask the device about a batch; an overridden one asks the device.

        So does ``get_batch`` where a hook may change the batch on its way to the device.
        """
        if self.has_own_get_batch or has_transfer_hooks(self):
            return {}
        batch = given(batch)
        return ask(batch, self._questions(batch))

    def _questions(self, batch: Batch) -> Iterable[Question]:
        """What ``get_batch`` asks about a batch of the loader's; ``batch`` has only keys that have a value."""
        return ()

    def lengths(self, batch: Any) -> tuple[int, ...]:
        """Tokens of one sequence, padding included; a T5 has two numbers: encoder and decoder.

        Args:
            batch: A batch that has run, as the loader gave it. With an overridden ``get_batch``, the numbers are those
                of the micro-batch that ran last.
        """
        return self._lengths_of_own if self.has_own_get_batch else self._padded_lengths(batch)

    def sequence_length(self, batch: Any) -> int:
        """Tokens of what travels between pipeline stages: of an encoder-decoder, both sides, one behind the other."""
        return sum(self._padded_lengths(batch))

    def _padded_lengths(self, batch: Any) -> tuple[int, ...]:
        own = self.has_own_get_batch
        return self._padded(self._input_lengths(self.get_batch(batch)) if own else self._loaded_lengths(given(batch)))

    def _padded(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        multiple = self._length_multiple
        return tuple(-(-length // multiple) * multiple for length in lengths)

    @abstractmethod
    def _check_loaded(self, batch: Batch) -> None:
        """Refuse a batch of the loader's; ``batch`` has only keys that have a value."""

    @abstractmethod
    def _check_inputs(self, inputs: Batch) -> None:
        """Refuse what an overridden ``get_batch`` returned."""

    @abstractmethod
    def _loaded_lengths(self, batch: Batch) -> tuple[int, ...]:
        """Tokens of one sequence in a batch of the loader's."""

    @abstractmethod
    def _input_lengths(self, inputs: Batch) -> tuple[int, ...]:
        """Tokens of one sequence in what ``get_batch`` returned."""

    def _get_checked_batch(self, batch: Batch) -> Batch:
        """``get_batch``; what an overridden one returns is checked on the chunks that look its tokens and labels up."""
        inputs = self.get_batch(batch)
        chunk = self.active_model
        if self.has_own_get_batch and (chunk.pre_process or chunk.post_process):
            self._check_inputs(inputs)
        return inputs

    def _get_batch_to_predict(self, batch: Any) -> Batch:
        """``get_batch``, in a call that no ``check_batch`` may have come before."""
        if not self.has_own_get_batch:
            self._named_tensors(batch)
        return self._get_checked_batch(batch)

    def _get_measured_batch(self, batch: Batch) -> Batch:
        """As ``_get_checked_batch``; the lengths of what an overridden ``get_batch`` returned are noted."""
        inputs = self._get_checked_batch(batch)
        if self.has_own_get_batch:
            self._lengths_of_own = self._padded(self._input_lengths(inputs))
        return inputs

    def _chunk_step(self, batch: Batch) -> Any:
        # Nothing here holds the whole rows that get_batch made while the chunk runs.
        inputs = self._fitted(self._get_measured_batch(batch))
        labels = {"labels": self._weighted_labels(inputs)} if self._sums_losses else {}
        output = self.active_model(**{**inputs, **labels})
        return self.loss(output, inputs) if self.on_last_stage else output

    @property
    def _sums_losses(self) -> bool:
        """Whether the active chunk gives the sum of the losses, which is all that the family's own ``loss`` needs."""
        layer = getattr(self.active_model, "output_layer", None)
        gives_losses = isinstance(layer, OutputLayer) and layer.gives_losses
        return gives_losses and not self.has_own_loss

    def _weighted_labels(self, inputs: Batch) -> WeightedLabels:
        """The labels of a micro-batch's tokens, and what each counts in the loss."""
        raise NotImplementedError

    @property
    def _predicts(self) -> bool:
        """Whether no loss is asked for: in ``trainer.predict``, or in a call without a Trainer."""
        return self._trainer is None or bool(self.trainer.predicting)

    def _named_tensors(self, batch: Any) -> Batch:
        """A batch of the loader's, without keys that have no value.

        Raises:
            ValueError: The batch is no mapping, or has a key without a counterpart here.
        """
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"{type(self).__name__} takes batches that are dicts of tensors; this one is a {type(batch).__name__}."
                " Return a dict from the collate function, or override get_batch."
            )
        refuse(type(self).__name__, batch, {**UNMET, **self._unmet_keys()})
        return given(batch)

    def _unmet_keys(self) -> dict[str, str]:
        """Further keys of transformers' batches that the family has no counterpart of, and what to do instead."""
        return {}

    def forward(self, **batch: Any) -> Any:
        """What ``predict_step`` gives, where the model is whole on the rank.

        Raises:
            RuntimeError: The model has pipeline stages; ``trainer.predict`` gives it under every layout.
        """
        self._check_callable()
        return self.predict_step(batch, 0)


def known_modules() -> dict[str, type[ConfiguredModule]]:
    """The modules of all families, also the user's own, by the ``kind`` of their configurations."""
    return dict(sorted(_BY_KIND.items()))
