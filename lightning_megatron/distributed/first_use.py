"""Lets a package import the names that it offers when they are first used; its light files wait for nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def import_at_first_use(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a package (PEP 562); type checkers read the same names under ``TYPE_CHECKING``.

    Args:
        package: The package's full name.
        names: The names that it offers, by the modules in it that define them.
    """
    modules = {name: module for module, offered in names.items() for name in offered}

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return find
