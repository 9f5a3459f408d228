"""The manifest of a checkpoint (its files with their checksums), and the directory in which it is written.

The manifest is written last, and one rename makes the checkpoint visible. Until then it lies in
``<folder>/.unfinished/<name>``. What a killed save leaves there is removed by the next save into the folder; a lock
distinguishes it from a save that another run is making.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"
FORMAT = 2
_LOCK = "lock"
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is incomplete or damaged."""


class NoCheckpointError(CheckpointError, FileNotFoundError):
    """There is nothing at a checkpoint's path; like Lightning's own error, a FileNotFoundError."""

    def __init__(self, path: object) -> None:
        super().__init__(f"Checkpoint file not found: {path}. There is no file or directory of that name.")


class Staging:
    """The directory in which a checkpoint is written, used on rank 0.

    Args:
        path: The path at which the checkpoint becomes visible.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = staging_folder(path)

    def begin(self) -> None:
        """Remove what killed saves have left, and create the directory."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path.parent)
        self.folder.mkdir(parents=True, exist_ok=False)
        self._lock = (self.folder / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def publish(self, content: dict[str, Any], files: dict[str, tuple[int, int]]) -> None:
        """Write the manifest, sync everything to disk, and move the directory to its path.

        Args:
            content: Further entries of the manifest.
            files: Size and CRC-32 of each file, by its name within the directory.
        """
        listed = {name: {"bytes": size, "crc32": crc32} for name, (size, crc32) in sorted(files.items())}
        _write_json(self.folder / MANIFEST, {"format": FORMAT, **content, "files": listed})
        (self.folder / _LOCK).unlink()
        for folder in {self.folder, *((self.folder / name).parent for name in files)}:
            sync_folder(folder)
        _put(self.folder, self.path)
        sync_folder(self.path.parent)
        self.close()

    def abandon(self) -> None:
        """Remove everything that was written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Release the lock, and remove the ``.unfinished`` directory if it is empty."""
        if getattr(self, "_lock", None) is not None:
            self._lock.close()
        _remove_empty(self.folder.parent)


def staging_folder(path: Path) -> Path:
    """The directory in which the checkpoint ``path`` is written until it is complete."""
    return path.parent / UNFINISHED / path.name


def read(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: There is no manifest, or it is damaged.
    """
    file = path / MANIFEST
    if not path.exists():
        raise NoCheckpointError(path)
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file, and checkpoints of MegatronStrategy are directories. Checkpoints of a plain"
            " LightningModule on one rank, or of another strategy of Lightning, are files; only a plain LightningModule"
            " can load them, with fit(ckpt_path=) or load_from_checkpoint."
        )
    if not file.is_file():
        raise CheckpointError(
            f"{path} is not a complete checkpoint of MegatronStrategy: it has no {MANIFEST}, which is written last."
        )
    try:
        record = json.loads(file.read_text())
        manifest: dict[str, Any] = record["manifest"]
        if zlib.crc32(_canonical(manifest)) != record["crc32"]:
            raise ValueError("its checksum differs")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}).") from error
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {manifest['format']}; this version reads format {FORMAT}.")
    return manifest


def find_damage(path: Path, manifest: dict[str, Any], names: list[str], checksums: bool) -> list[str]:
    """List which of the files ``names`` are damaged, a line each; comparing checksums reads every file."""
    found = []
    for name in names:
        expected, file = manifest["files"][name], path / name
        if not file.is_file():
            found.append(f"{file} is missing")
        elif file.stat().st_size != expected["bytes"]:
            found.append(f"{file} has {file.stat().st_size} bytes, and {expected['bytes']} were written")
        elif checksums and checksum(file) != expected["crc32"]:
            found.append(f"{file} has changed since it was written (its checksum differs)")
    return found


def checksum(file: Path) -> int:
    """Compute the CRC-32 of a file."""
    crc32 = 0
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            crc32 = zlib.crc32(block, crc32)
    return crc32


def leftovers(folder: Path) -> list[Path]:
    """List what killed saves and removals have left in a folder of checkpoints."""
    unfinished = folder / UNFINISHED
    return sorted(path for path in unfinished.iterdir() if not _is_locked(path)) if unfinished.is_dir() else []


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what killed saves have left in a folder, and return the removed paths."""
    found = leftovers(folder)
    for path in found:
        _delete(path)
    _remove_empty(folder / UNFINISHED)
    return found


def remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that no checkpoint with missing files is ever visible."""
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    for link in path.parent.iterdir():  # links to it now point to the newest other checkpoint
        if link.is_symlink() and link.resolve() == path.resolve() and (other := newest(path.parent, but=path)):
            make_link(link, other)
    aside = path.parent / UNFINISHED / f"removed-{path.name}"
    aside.parent.mkdir(exist_ok=True)
    _delete(aside)
    path.rename(aside)
    _delete(aside)
    _remove_empty(aside.parent)


def make_link(path: Path, target: Path) -> None:
    """Make ``path`` a link to the checkpoint ``target``, atomically even if ``path`` exists."""
    made = path.parent / UNFINISHED / f"link-{path.name}"
    made.parent.mkdir(exist_ok=True)
    _delete(made)
    made.symlink_to(os.path.relpath(target, path.parent))
    _put(made, path)
    sync_folder(path.parent)
    _remove_empty(made.parent)


def newest(folder: Path, but: Path | None = None) -> Path | None:
    """Return the complete checkpoint of a folder that was saved last, ``but`` left out of account, or None."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if (but is None or path.resolve() != but.resolve()) and (path / MANIFEST).is_file():
            try:
                manifest = read(path)
            except CheckpointError:
                continue
            if not find_damage(path, manifest, list(manifest["files"]), checksums=False):
                found.append((manifest["saved_at"], path))
    return max(found)[1] if found else None


def sync_folder(folder: Path) -> None:
    """Sync the file names of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(new: Path, path: Path) -> None:
    """Move ``new`` to ``path``, atomically even if ``path`` exists; the old one is removed."""
    if not path.exists() and not path.is_symlink():
        new.rename(path)
        return
    if not _exchange(new, path):  # the file system cannot exchange names: between the two renames, nothing has the name
        old = new.with_name(f"replaced-{path.name}")
        _delete(old)
        path.rename(old)
        new.rename(path)
        new = old
    sync_folder(path.parent)
    _delete(new)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically if the system can (Linux 3.15, most local file systems); whether it did."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if done != 0 and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    return bool(done == 0)


def _is_locked(path: Path) -> bool:
    try:
        with (path / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _write_json(file: Path, manifest: dict[str, Any]) -> None:
    with file.open("w") as opened:
        json.dump({"crc32": zlib.crc32(_canonical(manifest)), "manifest": manifest}, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()


def _delete(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
