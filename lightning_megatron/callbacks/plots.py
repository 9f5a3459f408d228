"""matplotlib, where it is installed, without a screen."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def check(what: str) -> None:
    """Refuse to draw without matplotlib.

    Args:
        what: That draws.

    Raises:
        ModuleNotFoundError: Says how to install it.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            f"{what} draws with matplotlib, which is not installed: pip install 'lightning-megatron[plots]'."
        )


def pyplot(what: str) -> Any:
    """matplotlib.pyplot; raises as ``check``."""
    check(what)
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
