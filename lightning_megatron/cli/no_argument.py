"""Words the error of an argument that does not exist; the command's own check and jsonargparse's errors share it."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_megatron.distributed.wrong_names import elsewhere, meant
from lightning_megatron.strategy.former_arguments import replacement


def no_argument(beginning: str, name: str, known: Iterable[str], owner: str, value: object = ...) -> str:
    """Say that there is no such argument, and what to write.

    Args:
        beginning: The full name of the group that it was sought in, as ``--trainer.`` or ``trainer.``.
        name: Its name in the group.
        known: The names that there are.
        owner: The class whose arguments they are; empty for none.
        value: The value that it was given.
    """
    if owner == "MegatronStrategy" and (told := replacement(name, value)):
        return told
    choices = sorted(known)
    found = meant(name, choices, owner)
    if found:
        remedy = f"did you mean {beginning}{found}?"
    else:
        remedy = elsewhere(name, owner) or f"it takes {', '.join(choices)}"
    return f"there is no argument {beginning}{name}; {remedy}"
