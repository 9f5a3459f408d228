"""Refuses former arguments of ``MegatronStrategy``; the error says what to use in their place."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

_Self = TypeVar("_Self")
_Arguments = ParamSpec("_Arguments")

# Former arguments that are fields of ``Checkpointing`` now, with the name of the field.
_OF_CHECKPOINTING = {
    "async_save": "async_save",
    "on_save_error": "on_save_error",
    "verify_checkpoint": "verify_checksums",
    "trust_checkpoint": "allow_pickle",
    "optimizer_settings": "optimizer_settings",
    "skip_batches": "skip_batches",
}
_MONITOR = "use Trainer(callbacks=lightning_megatron.callbacks.TrainingMonitor()), which logs it"
# What to use in place of the other former arguments; it depends on their value.
_ELSEWHERE: dict[str, Callable[[Any], str]] = {
    "log_grad_norm": lambda value: _MONITOR if value else "leave it out",
    "log_data_position": lambda value: _MONITOR if value else "leave it out",
    "initial_loss_scale": lambda value: (
        f"use Trainer(plugins=MegatronPrecision('16-mixed', initial_loss_scale={value!r})) and no Trainer(precision=)"
    ),
    "check_loss": lambda value: "use on_nonfinite='raise'" if value else "use on_nonfinite='ignore'",
}


def replacement(name: str, value: Any) -> str:
    """The sentence that names what to use in place of a former argument; empty for any other name.

    Args:
        name: The argument's name.
        value: Its value.
    """
    if name in _OF_CHECKPOINTING:
        remedy = f"use checkpointing=Checkpointing({_OF_CHECKPOINTING[name]}={value!r})"
    elif name in _ELSEWHERE:
        remedy = _ELSEWHERE[name](value)
    else:
        return ""
    return f"MegatronStrategy({name}={value!r}): {remedy}."


def refuse_former_arguments(
    init: Callable[Concatenate[_Self, _Arguments], None],
) -> Callable[Concatenate[_Self, _Arguments], None]:
    """Have a constructor refuse former arguments by name; its signature stays as it is.

    Args:
        init: The constructor. A call that gives it a former argument raises ``TypeError``.
    """

    @wraps(init)
    def checked(self: _Self, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        for name, value in kwargs.items():
            if refusal := replacement(name, value):
                raise TypeError(refusal)
        init(self, *args, **kwargs)

    return checked
