"""Imports matplotlib so that it draws without a screen."""

from __future__ import annotations

from typing import Any

from lightning_megatron.distributed import extras


def check(feature: str) -> None:
    """Refuse to draw without matplotlib.

    Args:
        feature: The name by which the user knows the part that draws.

    Raises:
        ModuleNotFoundError: Says how to install it.
    """
    extras.require("matplotlib", "plots", feature)


def pyplot(feature: str) -> Any:
    """Return matplotlib.pyplot; raises as ``check``."""
    check(feature)
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
