"""Reads the arguments of a class from its source, without importing it.

Importing Lightning takes seconds, and a mistyped argument is to be answered at once.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

Names = tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A class in its module.

    Args:
        module: The module's full name.
        node: The class's definition.
    """

    module: str
    node: ast.ClassDef


@functools.cache
def arguments_of(path: str) -> dict[str, ast.expr | None] | None:
    """The arguments of a class with their annotations; None where the source does not tell them all.

    Args:
        path: The class's full name, such as ``lightning_megatron.GPTConfig``.
    """
    module, _, name = path.rpartition(".")
    source = find_class(module, name)
    return None if source is None else _arguments(source)


def is_dataclass(path: str) -> bool:
    """Whether a class is surely a dataclass.

    Args:
        path: The class's full name.
    """
    module, _, name = path.rpartition(".")
    source = find_class(module, name)
    return source is not None and _is_dataclass(source.node)


def named_arguments_of(path: str, method: str) -> Names:
    """The arguments of a method that it names, without those that it collects; none where there is no such method.

    Args:
        path: The class's full name.
        method: The method's name.
    """
    module, _, name = path.rpartition(".")
    source = find_class(module, name)
    for node in source.node.body if source else []:
        if isinstance(node, ast.FunctionDef) and node.name == method:
            return tuple(each.arg for each in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs][1:])
    return ()


@functools.cache
def find_class(module: str, name: str) -> Source | None:
    """Find the definition of a class that a module defines or imports; None if there is none."""
    tree = _tree(module)
    if tree is None:
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Source(module, node)
    for imported in ast.walk(tree):
        if isinstance(imported, ast.ImportFrom):
            for alias in imported.names:
                if (alias.asname or alias.name) == name:
                    return find_class(_imported_from(imported, module), alias.name)
    return None


def names_imported_by(module: str) -> Names:
    """The names that a module imports from others, such as a package its classes from their files."""
    tree = _tree(module)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)] if tree else []
    return tuple(alias.asname or alias.name for node in found for alias in node.names)


def class_in(annotation: ast.expr | None, module: str) -> str | None:
    """The full name of the class of an annotation such as ``LoRA`` or ``LoRA | None``; None for any other."""
    if (
        isinstance(annotation, ast.BinOp)
        and isinstance(annotation.right, ast.Constant)
        and annotation.right.value is None
    ):
        annotation = annotation.left
    source = find_class(module, annotation.id) if isinstance(annotation, ast.Name) else None
    return f"{source.module}.{source.node.name}" if source else None


def _imported_from(node: ast.ImportFrom, module: str) -> str:
    """The full name of the module that names are imported from, which may be relative."""
    if not node.level:
        return node.module or ""
    file = _file(module)
    up = node.level - (file is not None and file.name == "__init__.py")
    parts = module.split(".")
    return ".".join([*parts[: len(parts) - up], *filter(None, [node.module])])


def _arguments(source: Source) -> dict[str, ast.expr | None] | None:
    """The arguments of its own constructor, of its fields, or of its bases."""
    constructors = [n for n in source.node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    if constructors:
        given = constructors[0].args
        if given.kwarg is not None:
            return None
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs][1:]
        return {argument.arg: argument.annotation for argument in every}
    bases = [_base(base, source.module) for base in source.node.bases]
    inherited = [_arguments(base) for base in bases if base is not None]
    if not _is_dataclass(source.node):
        return inherited[0] if len(inherited) == 1 else None
    if len(inherited) != len(bases) or None in inherited:
        return None
    found = {name: annotation for each in inherited for name, annotation in (each or {}).items()}
    return {**found, **dict(_fields(source.node))}


def _base(base: ast.expr, module: str) -> Source | None:
    return find_class(module, base.id) if isinstance(base, ast.Name) else None


def _is_dataclass(node: ast.ClassDef) -> bool:
    made_by = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
    return any(isinstance(each, ast.Name) and each.id == "dataclass" for each in made_by)


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    for each in node.body:
        if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
            continue
        if each.target.id != "_" and not any(word in ast.unparse(each) for word in ("ClassVar", "init=False")):
            yield each.target.id, each.annotation


@functools.cache
def _tree(module: str) -> ast.Module | None:
    path = _file(module)
    return None if path is None else ast.parse(path.read_text(encoding="utf-8"))


def _file(module: str) -> Path | None:
    """The file of a module, found without importing the packages that it is in."""
    top, *rest = module.split(".")
    if top in sys.stdlib_module_names:
        return None
    spec = find_spec(top)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder).joinpath(*rest)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return file
    return None
