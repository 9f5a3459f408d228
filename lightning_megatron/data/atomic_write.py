"""Files that are either complete or absent, whoever writes them and whenever they are killed."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; the file there replaces ``path`` when the block ends without an error.

    Several processes may write the same file at once: each has its own temporary name, and the last one to finish
    wins. A killed process leaves at most a hidden ``.tmp`` file that nobody reads.

    Args:
        path: The file to write. Its folder must exist.

    Yields:
        The path to write to, in the same folder, because a rename is atomic only within one file system.
    """
    # Not `tempfile`: its files are readable by their owner alone, and a cache is often shared.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
