"""What to use in place of the former arguments of ``MegatronStrategy``, which are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
