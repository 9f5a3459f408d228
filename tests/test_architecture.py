"""``docs/architecture.md`` has a row for every room, and each room imports only what stands above it there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.pages import DOCS, ROOT

PACKAGE = ROOT / "lightning_megatron"
TEXT = (DOCS / "architecture.md").read_text().split("## The rooms, from the ground up")[1].split("\n## ")[0]
ROWS = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `")]
PLACES = {name.removesuffix(".py"): n for n, row in enumerate(ROWS) for name in re.findall(r"`(\w+)(?:\.py|/)`", row)}
DOORS = {"__init__", "__main__", "version"}


def room(module: str) -> str:
    """The file or folder of the package that a module is, or is in."""
    return module.split(".")[1] if "." in module else ""


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_megatron"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lightning_megatron"))


def files() -> Iterator[tuple[str, Path]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        name = room(".".join(file.relative_to(ROOT).with_suffix("").parts))
        if name not in DOORS:
            yield name, file


def test_every_room_has_one_row():
    assert {name for name, _ in files()} == PLACES.keys()


def test_each_imports_only_what_stands_above_it():
    upward = {
        f"{file.relative_to(ROOT)} imports {found}"
        for name, file in files()
        for found in imports(file)
        if PLACES.get(room(found), -1) > PLACES[name]
    }
    assert not upward
