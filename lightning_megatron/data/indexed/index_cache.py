"""Builds the indices of Megatron's datasets once on each machine, in a folder that is complete or absent."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_megatron.data.indexed import index_builder
from lightning_megatron.data.indexed.files import files

log = logging.getLogger(__name__)

# To be raised when the same description gives other samples than before.
_FORMAT = 1

Description = dict[str, Any]


def build(descriptions: Sequence[Description], cache_dir: Path) -> None:
    """Build the indices of each description, unless they exist.

    They are built in a temporary folder, which is then renamed: if several processes build the same indices at once,
    the first one to finish wins, and the others read its indices. The folder's name is made from the description and
    from the data's sizes and times, so that changed data get new indices (megatron-core's own names do not change).

    Args:
        descriptions: Descriptions of datasets, as ``index_builder.dataset`` takes them.
        cache_dir: The folder of all indices, made if it does not exist.

    Raises:
        RuntimeError: megatron-core could not build them, or is installed without its compiled helper.
    """
    missing = [about for about in descriptions if not folder(about, cache_dir).is_dir()]
    if not missing:
        return
    _require_helper()
    cache_dir.mkdir(parents=True, exist_ok=True)
    places = [folder(about, cache_dir) for about in missing]
    temporaries = [cache_dir / f".{place.name}.{uuid.uuid4().hex}.tmp" for place in places]
    try:
        for temporary in temporaries:
            temporary.mkdir()
        _run_builder([(about, str(temporary)) for about, temporary in zip(missing, temporaries, strict=True)])
        for temporary, place in zip(temporaries, places, strict=True):
            _move(temporary, place)
    finally:
        for temporary in temporaries:
            shutil.rmtree(temporary, ignore_errors=True)


def open_dataset(description: Description, cache_dir: Path) -> Any:
    """Open the dataset of a description. If there is a process group, all of its ranks call this together.

    Raises:
        RuntimeError: :func:`build` was not called on this machine, or its files were changed.
    """
    place = folder(description, cache_dir)
    if not place.is_dir():
        raise RuntimeError(
            f"{cache_dir} has no indices of {description['paths']} for these samples: call `prepare_data()` before"
            " `setup()`, on every machine that does not share this folder."
        )
    try:
        return index_builder.dataset(description, str(place))
    except (EOFError, OSError, ValueError) as error:
        raise RuntimeError(
            f"The indices in {place} cannot be read: {error}. Remove the folder and run again."
        ) from error


def folder(description: Description, cache_dir: Path) -> Path:
    """The folder of a description's indices, which need not exist."""
    stats = [path.stat() for prefix in description["paths"] for path in files(prefix)]
    tokenizer = {name: value for name, value in description["tokenizer"].items() if name != "tokens"}
    about = {
        **description,
        "tokenizer": tokenizer,
        "format": _FORMAT,
        "files": [[stat.st_size, stat.st_mtime_ns] for stat in stats],
    }
    return cache_dir / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]


def _move(temporary: Path, place: Path) -> None:
    try:
        temporary.rename(place)
        log.info("Built indices of Megatron's datasets: %s", place)
    except OSError:
        if not place.is_dir():  # another process was first
            raise


def _run_builder(asked: list[tuple[Description, str]]) -> None:
    done = subprocess.run(
        # -P keeps the script's own folder out of sys.path.
        [sys.executable, "-P", index_builder.__file__],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        paths = sorted({path for about, _ in asked for path in about["paths"]})
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(
            f"megatron-core could not build the {asked[0][0]['kind']} indices of {paths} (exit code"
            f" {done.returncode}):\n{last}"
        )


def _require_helper() -> None:
    if find_spec("megatron.core.datasets.helpers_cpp") is None:
        raise RuntimeError(
            "megatron-core is installed without its compiled helper (megatron/core/datasets/helpers_cpp), which builds"
            " the indices. Its wheels have it; an installation from source needs a C++ compiler and pybind11. Install a"
            " wheel: pip install --force-reinstall --no-deps --only-binary :all: megatron-core"
        )
