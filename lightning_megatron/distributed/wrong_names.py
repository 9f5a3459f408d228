"""Answers an argument that does not exist: the one that was meant, where it is instead, or which there are.

``other_names.py`` has what other tools call the arguments. Imports nothing heavy, so that a mistyped option of the
command is answered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from lightning_megatron.distributed import other_names
from lightning_megatron.distributed.suggestions import closest_name

# Functions of a name and a class, which know what became of more names; empty where they do not know it.
further_tables: list[Callable[[str, str], str]] = []


def meant(name: str, known: Iterable[str], owner: str = "") -> str | None:
    """Find the argument that was meant, by another tool's name for it or as a typing error.

    Args:
        name: The name that does not exist.
        known: The arguments that there are.
        owner: The name of the class that has them.

    Returns:
        One of ``known``; for a switch of another tool with its value, as in "activation='swiglu'". None if the name
        is like none of them, or is known to be elsewhere.
    """
    choices = list(known)
    plain = _plain(name)
    found = next((ours for ours in _ours(plain, owner) if ours in choices), None)
    if found is not None:
        return _with_value(plain, found)
    if elsewhere(plain, owner):
        return None
    return closest_name(plain, choices, 0.6) or _part(plain, choices)


def elsewhere(name: str, owner: str = "") -> str:
    """Say where an argument is that ``owner`` does not have; empty if it is known nowhere.

    Args:
        name: The name that does not exist.
        owner: The name of the class that has no such argument.
    """
    plain = _plain(name)
    groups = [("Trainer", other_names.TRAINER), *other_names.OTHERS.items()]
    for of in (owner, ""):
        for names, words in other_names.ELSEWHERE.get(of, {}).items():
            if plain in names.split():
                return words
    homes = [(classes.split()[0], arguments) for classes, arguments in groups if owner not in classes.split()]
    for find in (_own, _called):
        for home, arguments in homes:
            if found := find(plain, arguments):
                return f"it is {home}({_with_value(plain, found, '=')})"
    return next(filter(None, (table(plain, owner) for table in further_tables)), "")


def answer(name: str, known: Iterable[str], owner: str = "") -> str:
    """Say what to write in place of a name that does not exist: half a sentence, such as "use num_layers".

    Args:
        name: The name that does not exist.
        known: The arguments that there are.
        owner: The name of the class that has them.
    """
    choices = list(known)
    if found := meant(name, choices, owner):
        known_alias = found.partition("=")[0] in _ours(_plain(name), owner)
        return f"use {found}" if known_alias else f"did you mean {found}?"
    if words := elsewhere(name, owner):
        return words
    return f"it takes {', '.join(sorted(choices))}" if choices else "it takes no arguments"


def unknown_name(names: str | Iterable[str], known: Iterable[str], owner: str) -> str:
    """Say that a class has no such arguments, a line for each.

    Args:
        names: The name, or all names, that do not exist.
        known: The arguments that there are.
        owner: The name of the class.
    """
    choices = list(known)
    lines = []
    for name in [names] if isinstance(names, str) else names:
        told = answer(name, choices, owner)
        lines.append(f"{owner} has no argument {name!r}: {told}{'' if told.endswith('?') else '.'}")
    return "\n".join(lines)


def _plain(name: str) -> str:
    return name.strip("-_").replace("-", "_").lower()


def _ours(name: str, owner: str) -> Iterator[str]:
    """The arguments that others call ``name``; those of ``owner`` come first."""
    tables = sorted(other_names.OTHERS.items(), key=lambda table: owner not in table[0].split())
    groups: list[Mapping[str, str]] = [arguments for _, arguments in tables]
    if owner in ("", "Trainer"):
        groups = [other_names.TRAINER, *groups]
    for arguments in groups:
        yield from (ours for ours, others in arguments.items() if name in others.lower().split())


def _own(name: str, arguments: Mapping[str, str]) -> str | None:
    """The argument of that name."""
    return name if name in arguments else None


def _called(name: str, arguments: Mapping[str, str]) -> str | None:
    """The argument that others call ``name``."""
    return next((ours for ours, others in arguments.items() if name in others.lower().split()), None)


def _with_value(name: str, ours: str, otherwise: str = "") -> str:
    values = other_names.VALUES.get(name, "").split()
    return next((value for value in values if value.startswith(f"{ours}=")), ours + otherwise)


def _part(name: str, choices: list[str]) -> str | None:
    """The only argument of whose name ``name`` is a part, such as "heads" of "num_attention_heads"."""
    found = [choice for choice in choices if len(name) > 2 and name in choice]
    return found[0] if len(found) == 1 else None
