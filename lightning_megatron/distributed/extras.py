"""Optional packages: a feature whose package is not installed says which extra of this project to install."""

from __future__ import annotations

from importlib.util import find_spec


def require(package: str, extra: str, feature: str) -> None:
    """Refuse a feature whose optional package is not installed; nothing is imported.

    lightning_utilities' ``RequirementCache`` is not used: it advises the package, at no version that was tried here,
    while an extra installs one that was.

    Args:
        package: The package's name in Python.
        extra: The extra of this project that installs it.
        feature: The name by which the user knows the part that needs it.

    Raises:
        ModuleNotFoundError: Says which command installs the extra.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{feature} needs {package}, which is not installed: pip install 'lightning-megatron[{extra}]'.",
            name=package,
        )
