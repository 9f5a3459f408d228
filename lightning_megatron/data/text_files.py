"""Finds the text files of a corpus, always in the same order, and reads them."""

import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

# Test suites, applications and grammar tables are large, repetitive, or not installed everywhere.
_EXCLUDED = {"__pycache__", "idlelib", "lib2to3", "site-packages", "test", "tests"}

# The first bytes of files that are not text, and the kind of file.
_NOT_TEXT = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
}
_SURROGATE = re.compile("[\ud800-\udfff]")


def find_text_files(paths: str | Path | Sequence[str | Path], suffixes: Sequence[str]) -> list[Path]:
    """List the text files that ``paths`` name.

    Args:
        paths: A file or folder, or several. A file is taken whatever its suffix; a folder is searched with its
            subfolders.
        suffixes: Endings of the files to take from folders, such as ``(".py", ".txt")``.

    Returns:
        Absolute paths, in the order of ``paths`` and sorted within each folder, each file once.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: No file was found, or one is compressed.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    files = [file.resolve() for path in given for file in _files_below(path.expanduser(), tuple(suffixes))]
    if not files:
        raise ValueError(
            f"No text file ends with one of {list(suffixes)} in {[str(path) for path in given]}. "
            "Name other `paths`, or add the ending of your files to `suffixes`."
        )
    for file in files:
        _check_text(file)
    return list(dict.fromkeys(files))


def standard_library_sources() -> list[Path]:
    """List the source files of the running Python's standard library, a corpus that needs no download.

    They are the top-level modules and packages, without installed packages, test suites, ``idlelib`` and ``lib2to3``.

    Returns:
        Absolute paths, sorted.

    Raises:
        FileNotFoundError: This Python was installed without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"]).resolve()
    packages = [init.parent for init in root.glob("*/__init__.py")]
    files = [*root.glob("*.py"), *(file for package in packages for file in package.rglob("*.py"))]
    kept = sorted(file for file in files if not _EXCLUDED.intersection(file.relative_to(root).parts))
    if not kept:
        raise FileNotFoundError(
            f"This Python has no standard library sources in {root}. Name text files or folders with `paths`."
        )
    return kept


def read_text(path: Path) -> str:
    """Read one document. Bytes that are not UTF-8 become U+FFFD, so that one odd file does not stop a corpus."""
    return path.read_text(encoding="utf-8", errors="replace")


def lone_surrogate(text: str) -> str | None:
    """Find the first half of a surrogate pair that stands alone, which UTF-8 cannot encode; None if there is none."""
    found = _SURROGATE.search(text)
    return None if found is None else f"\\u{ord(found[0]):04x}"


def _check_text(file: Path) -> None:
    with file.open("rb") as content:
        start = content.read(8)
    kind = next((kind for begin, kind in _NOT_TEXT.items() if start.startswith(begin)), None)
    if kind is not None:
        raise ValueError(f"{file} is a {kind} file and not text. Unpack it first, into .jsonl or .txt files.")


def _files_below(path: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    if not path.exists():
        raise FileNotFoundError(f"The text path {path} does not exist (seen from {Path.cwd()}). Correct `paths`.")
    if path.is_file():
        yield path
    else:
        yield from sorted(file for file in path.rglob("*") if file.name.endswith(suffixes) and file.is_file())
