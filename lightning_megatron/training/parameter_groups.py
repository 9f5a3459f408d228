"""``ParameterGroups``: which parameters have no weight decay, and which have another learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_megatron.distributed.argument_names import answer_wrong_names
from lightning_megatron.distributed.arguments import Arguments

OptimizerCallable = Callable[[Iterable[torch.nn.Parameter]], Optimizer]
# Whether a condition holds for a parameter, given its name in the whole model and the parameter.
Predicate = Callable[[str, torch.nn.Parameter], bool]
NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]


def default_optimizer(parameters: Iterable[torch.nn.Parameter]) -> Optimizer:
    """AdamW as GPT-3's authors set it (arXiv 2005.14165, appendix B), for models of up to a few hundred million."""
    return torch.optim.AdamW(parameters, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def biases_and_vectors(name: str, parameter: torch.nn.Parameter) -> bool:
    """Megatron's rule for parameters without weight decay: biases, and parameters of one dimension, such as norms."""
    return name.endswith(".bias") or parameter.dim() == 1


@answer_wrong_names
@dataclass(frozen=True)
class ParameterGroups:
    """A torch optimizer over parameter groups, made by conditions on each parameter.

    A condition is a function of the name and the parameter, or a list of patterns of names (``"*.bias"``). Under every
    layout it sees the same: the name is the whole model's (layers numbered from 0 through all pipeline stages, a tied
    output layer under the embedding's name), and the parameter has the whole model's number of dimensions. Its sizes
    are this rank's: a condition on them would differ from layout to layout.

    Args:
        optimizer: Makes the torch optimizer from groups of parameters; None takes ``default_optimizer``.
        no_weight_decay: The parameters without weight decay; ``biases_and_vectors`` is Megatron's rule. None gives
            weight decay to all.
        scale_lr: The parameters whose learning rate is multiplied by ``lr_mult``.
        lr_mult: The factor for ``scale_lr``.

    Raises:
        ValueError: ``lr_mult`` without ``scale_lr`` or the reverse, or a negative one.
    """

    optimizer: OptimizerCallable | None = None
    _: KW_ONLY
    no_weight_decay: Predicate | list[str] | None = None
    scale_lr: Predicate | list[str] | None = None
    lr_mult: float = 1.0

    def __post_init__(self) -> None:
        """Refuse arguments that only make sense together."""
        arguments = Arguments("ParameterGroups")
        arguments.number(lr_mult=self.lr_mult)
        if not callable(self.optimizer) and self.optimizer is not None:
            raise ValueError(
                f"ParameterGroups(optimizer={self.optimizer!r}): use a function that makes an optimizer from"
                " parameters, such as functools.partial(torch.optim.AdamW, lr=1e-3), or None."
            )
        conditions = {"no_weight_decay": self.no_weight_decay, "scale_lr": self.scale_lr}
        arguments.names(optional=True, **{name: value for name, value in conditions.items() if not callable(value)})
        if (self.scale_lr is None) != (self.lr_mult == 1.0):
            raise ValueError(
                f"ParameterGroups(scale_lr={self.scale_lr}, lr_mult={self.lr_mult}): scale_lr says which parameters,"
                " and lr_mult by how much. Give both or neither."
            )
        if self.lr_mult < 0:
            raise ValueError(f"ParameterGroups(lr_mult={self.lr_mult}) is negative. Use 0 or more.")

    def split(self, parameters: NamedParameters) -> dict[str, dict[str, torch.nn.Parameter]]:
        """Sort the trainable parameters into groups; every rank has the same groups, even if one is empty.

        Args:
            parameters: Parameters with their names in the whole model: ``MegatronModule.named_shards()``, or a plain
                module's ``named_parameters()``.
        """
        groups: dict[str, dict[str, torch.nn.Parameter]] = {name: {} for name in self._names()}
        for name, parameter in parameters:
            if parameter.requires_grad:
                scaled = _holds(self.scale_lr, name, parameter)
                undecayed = _holds(self.no_weight_decay, name, parameter)
                groups[_group_name(scaled, undecayed)][name] = parameter
        return groups

    def build(self, parameters: NamedParameters) -> Optimizer:
        """Make the torch optimizer.

        Its groups carry a ``name``, which LearningRateMonitor shows, and Megatron's ``wd_mult`` and ``lr_mult``.

        Args:
            parameters: The parameters, in the form that ``split`` takes.
        """
        groups: list[dict[str, Any]] = [
            {"params": list(members.values()), "name": name} for name, members in self.split(parameters).items()
        ]
        made = (self.optimizer or default_optimizer)(groups)  # type: ignore[arg-type]
        for group in made.param_groups:
            scaled, undecayed = "scaled_lr" in group["name"], "no_weight_decay" in group["name"]
            group["lr_mult"] = self.lr_mult if scaled else 1.0
            group["wd_mult"] = 0.0 if undecayed else 1.0
            group["lr"] = group["lr"] * group["lr_mult"]
            if "weight_decay" in group:
                group["weight_decay"] = group["weight_decay"] * group["wd_mult"]
        return made

    def _names(self) -> list[str]:
        scales = [False] if self.scale_lr is None else [False, True]
        decays = [False] if self.no_weight_decay is None else [False, True]
        return [_group_name(scaled, undecayed) for scaled in scales for undecayed in decays]


def _group_name(scaled: bool, undecayed: bool) -> str:
    return "_".join(["scaled_lr"] * scaled + ["no_weight_decay"] * undecayed) or "default"


def _holds(condition: Predicate | list[str] | None, name: str, parameter: torch.nn.Parameter) -> bool:
    if condition is None:
        return False
    if callable(condition):
        return bool(condition(name, parameter))
    return any(fnmatchcase(name, pattern) for pattern in condition)
