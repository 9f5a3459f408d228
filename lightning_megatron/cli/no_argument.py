"""Words the errors of arguments that do not exist, or that have a value in their place; two readers share it."""

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
        remedy = elsewhere(name, owner) or f"it takes {', '.join(choices) or 'none'}"
    return f"there is no argument {beginning}{name}; {remedy}"


def takes_arguments(place: str, value: str, owner: str, known: Iterable[str]) -> str:
    """Say that a value stands where there are arguments, and how to write these.

    Args:
        place: The full name of what was given, as ``--model.lora`` or ``model.init_args.lora``.
        value: What it was given.
        owner: The class whose arguments belong there.
        known: Their names.
    """
    first, *others = known
    more = ", ".join([first, *others[:7]]) + (" and more" if len(others) > 7 else "")
    written = f"{place}.{first}=..." if place.startswith("--") else f"{place.rpartition('.')[2]}: {{{first}: ...}}"
    return f"{place} is {value}; it takes arguments of {owner}: {more}. Write {written}"
