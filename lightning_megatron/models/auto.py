"""``AutoModule``: chooses the module class that a pretrained model needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from lightning_megatron import hf
from lightning_megatron.models.bert import module as bert  # noqa: F401  # each family's makes itself known
from lightning_megatron.models.configured_module import ConfiguredModule, known_modules
from lightning_megatron.models.gpt import module as gpt  # noqa: F401
from lightning_megatron.models.lora import LoRA, lora_module
from lightning_megatron.models.megatron_module import LossReduction, SchedulerCallable
from lightning_megatron.models.model_config import ModelConfig
from lightning_megatron.models.t5 import module as t5  # noqa: F401
from lightning_megatron.training.lr_schedule import LRSchedule
from lightning_megatron.training.parameter_groups import OptimizerCallable, ParameterGroups


class AutoModule:
    """Makes the module of a model's family, such as a ``GPTModule``, by what the model's configuration says it is."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | transformers.PreTrainedModel,
        *,
        config: dict[str, Any] | None = None,
        ignore: Sequence[str] = (),
        revision: str | None = None,
        optimizer: ParameterGroups | OptimizerCallable | None = None,
        lr_schedule: LRSchedule | SchedulerCallable | None = None,
        loss_reduction: LossReduction = "token",
        lora: LoRA | None = None,
        adapter: str | Path | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        **arguments: Any,
    ) -> ConfiguredModule:
        """Make a module as its class's own ``from_pretrained`` does; the arguments are named for the command line.

        Args:
            source: A directory, a model in memory, or a name on the Hugging Face hub.
            config: Fields of the module's configuration that are to differ, such as ``seq_length``.
            ignore: Fields of transformers' configuration that change nothing here; "architectures" loads a model of
                another head without that head.
            revision: Branch, tag or commit of a model on the hub.
            optimizer: Makes the torch optimizer from the parameters, or ``ParameterGroups``; AdamW by default.
            lr_schedule: ``LRSchedule``, or makes a scheduler from that optimizer.
            loss_reduction: "token" or "micro_batch", see ``MegatronModule``.
            lora: Low-rank updates that are trained in place of the weights. None: all weights are trained.
            adapter: Directory of low-rank updates to go on with, see ``load_adapter``.
            label_smoothing: Share of each label that training spreads evenly over all token ids, see ``LossTerms``.
            z_loss: Weight of ``(log Z)²`` in the training loss, see ``LossTerms``.
            **arguments: Further arguments of the module's ``__init__``.

        Raises:
            UnsupportedConfigError: An architecture without a counterpart.
        """
        base, own_adapter = lora_module.base_and_adapter(source)
        if own_adapter is not None and adapter is not None:
            raise ValueError(f"{own_adapter} is an adapter, and adapter={str(adapter)!r} another. Give one of them.")
        found = hf.open_source(base, revision)
        module_class = module_for(hf.family_of(found.config.model_type))
        named: dict[str, Any] = {"optimizer": optimizer, "lr_schedule": lr_schedule}
        named |= {"loss_reduction": loss_reduction, "lora": lora}
        terms = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        named |= {name: value for name, value in terms.items() if value}  # a module of the user's may have none
        chosen = own_adapter if adapter is None else Path(adapter)
        return module_class._from_source(found, config, ignore, {**named, **arguments}, chosen)


def module_for(family: hf.Family) -> type[ConfiguredModule]:
    """The module that the models of a family of transformers' become.

    Raises:
        UnsupportedConfigError: No module has the family's kind; names the kinds that there are.
    """
    known = known_modules()
    if family.kind not in known:
        raise hf.UnsupportedConfigError(
            f"{type(family).__name__}.kind is {family.kind!r}, and no module's configuration has that kind; there are"
            f" {', '.join(known)}. Correct it, or import the file that defines the module."
        )
    return known[family.kind]


def config_of(source: hf.Source) -> ModelConfig:
    """Our configuration of a model of transformers.

    Raises:
        UnsupportedConfigError: The model has no counterpart.
    """
    family = hf.family_of(source.config.model_type)
    found = hf.Pretrained.find(source, family.kind, {}, ())
    return module_for(family).config_type(**found.arguments())
