"""Rewrite the list of files in architecture.md from the first sentence of each module's docstring.

    python docs/list_modules.py [--check]

The list is in the order of imports: a file, or a subfolder, imports only what stands above it. ``--check`` changes
nothing, and ends with status 1 if the list is out of date.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_megatron"
PAGE = ROOT / "docs/architecture.md"
FOLDERS = ("distributed", "training", "data", "checkpoint", "hf", "models", "strategy", "callbacks", "cli")
BEGIN, END = "<!-- begin: python docs/list_modules.py -->\n", "<!-- end -->\n"

Module = tuple[str, ...]  # ("data", "text", "packing"); a package is its folder's, ("data", "text")


@functools.cache
def modules() -> dict[Module, Path]:
    """Every module of the package, and its file."""
    named = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        named[parts[:-1] if parts[-1] == "__init__" else parts] = file
    return named


def imports(file: Path) -> Iterator[Module]:
    """The modules of this package that a file imports anywhere in it; a package stands for all that it imports."""
    known = modules()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE.name:
            base = tuple(node.module.split(".")[1:])
            found = [(*base, alias.name) if (*base, alias.name) in known else base for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found = [tuple(parts[1:]) for parts in names if parts[0] == PACKAGE.name]
        else:
            continue
        for module in found:
            package = known[module].name == "__init__.py" and len(module) > 1
            yield from imports(known[module]) if package and known[module] != file else [module]


def units(folder: str) -> dict[str, set[str]]:
    """The files and subfolders of a folder, each with those of the same folder that it imports."""
    found: dict[str, set[str]] = {}
    for module, file in modules().items():
        if len(module) > 1 and module[0] == folder:
            inside = {other[1] for other in imports(file) if len(other) > 1 and other[0] == folder}
            found.setdefault(module[1], set()).update(inside - {module[1]})
    return found


def in_order(folder: str) -> list[str]:
    """The files and subfolders of a folder, each after those that it imports; a test refuses circles."""
    left, done = units(folder), []
    while left:
        ready = sorted(name for name, inside in left.items() if inside <= set(done)) or sorted(left)
        done.append(ready[0])
        del left[ready[0]]
    return done


def sentence(file: Path) -> str:
    """The first paragraph of a module's docstring."""
    return " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].split()).replace("``", "`")


def listed() -> str:
    """The list, in Markdown."""
    known, lines = modules(), []
    for folder in FOLDERS:
        lines += [f"### `{folder}/`", "", "| file | what is in it |", "|---|---|"]
        for unit in in_order(folder):
            file = known[folder, unit]
            lines.append(f"| `{unit}{'/' if file.name == '__init__.py' else '.py'}` | {sentence(file)} |")
            inside = [module for module in known if module[:2] == (folder, unit) and len(module) > 2]
            lines += [f"| · `{'/'.join(module[1:])}.py` | {sentence(known[module])} |" for module in inside]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Rewrite the list, or check it."""
    text = PAGE.read_text()
    new = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{listed()}\n{END}", text, flags=re.DOTALL)
    if "--check" not in sys.argv:
        PAGE.write_text(new)
    elif new != text:
        print(f"The list of files in {PAGE} is out of date: run python docs/list_modules.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
