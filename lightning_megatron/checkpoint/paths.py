"""Which paths checkpoints can be saved to: directories of a mounted file system, not addresses of object stores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def local_path(path: Any) -> Path:
    """Return a path on a mounted file system.

    Raises:
        MisconfigurationException: It is the address of an object store.
    """
    text = os.fspath(path)
    if "://" in text and not text.startswith("file://"):
        raise MisconfigurationException(
            f"MegatronStrategy cannot save to or load from {text!r}: every rank writes its part into a directory, which"
            " is renamed when it is complete, and object stores cannot rename. Use a directory that all nodes mount"
            " (ModelCheckpoint(dirpath=...)), and copy finished checkpoints from there."
        )
    return Path(text.removeprefix("file://"))


def check_folder(folder: Any) -> None:
    """Refuse a folder that no checkpoint can be saved to.

    Raises:
        MisconfigurationException: It is the address of an object store, or begins with ``file:``.
    """
    local_path(folder)
    if "file:" in Path(folder).parts:  # Lightning 2.6 makes this of file:///a
        raise MisconfigurationException(
            f"ModelCheckpoint would save to {os.fspath(folder)!r}, a folder named 'file:'. Give the path without"
            " file://, as dirpath or as the Trainer's default_root_dir."
        )
