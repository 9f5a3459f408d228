"""``docs/architecture.md`` is true: which folder imports which, in one direction, and what each file is."""

import re
import sys

import pytest

from tests.support.pages import DOCS, ROOT

sys.path.insert(0, str(DOCS))
import list_modules  # a script of the pages

TEXT = (DOCS / "architecture.md").read_text()
TABLE = TEXT.split("## The folders, from the ground up")[1].split("\n## ")[0]
ROWS = [line.split("|")[1:4] for line in TABLE.splitlines() if line.startswith("| `")]
DECLARED = {re.findall(r"`(\w+)/`", name)[0]: re.findall(r"`(\w+)`", imports) for name, _, imports in ROWS}
FOLDERS = list(DECLARED)


def test_twelve_doors():
    entries = {path.name for path in (ROOT / "lightning_megatron").iterdir()} - {"__pycache__", "py.typed"}
    assert entries == {*FOLDERS, "__init__.py", "__main__.py", "testing.py"}
    assert len(entries) <= 12
    assert tuple(FOLDERS) == list_modules.FOLDERS


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_what_its_row_names(folder):
    found = {
        other[0]
        for module, file in list_modules.modules().items()
        for other in list_modules.imports(file)
        if module and module[0] == folder and other and other[0] in FOLDERS
    }
    assert found - {folder} == set(DECLARED[folder])
    assert all(FOLDERS.index(other) < FOLDERS.index(folder) for other in DECLARED[folder])
    said = (ROOT / "lightning_megatron" / folder / "__init__.py").read_text().split('"""')[1]
    assert set(re.findall(r"``(\w+)``", said.split("Imports")[1])) == set(DECLARED[folder])


@pytest.mark.parametrize("folder", FOLDERS)
def test_inside_a_folder_imports_go_one_way(folder):
    order = list_modules.in_order(folder)
    units = list_modules.units(folder)
    circles = {
        name: inside & set(order[n:]) for n, name in enumerate(order) if (inside := units[name]) & set(order[n:])
    }
    assert not circles


def test_no_module_imports_itself_by_way_of_others():
    known = list_modules.modules()
    arrows = {module: {other for other in list_modules.imports(file) if other} for module, file in known.items()}

    def reaches(module, seen):
        for other in arrows[module] - seen:
            seen.add(other)
            reaches(other, seen)
        return seen

    assert not [module for module in known if len(module) > 1 and module in reaches(module, set())]


def test_one_name_one_meaning():
    """Files of one name are the same part of different families, kinds of data or tools."""
    shared = {
        "module",
        "config",
        "layer_spec",
        "model",
        "decoder",
        "datamodule",
        "tasks",
        "settings",
        "bert",
        "gpt2",
        "t5",
    }
    names = [module[-1] for module, file in list_modules.modules().items() if file.name != "__init__.py"]
    assert {name for name in names if names.count(name) > 1} <= shared


def test_every_module_says_what_is_in_it():
    assert not [str(file) for file in list_modules.modules().values() if len(list_modules.sentence(file)) < 10]


def test_the_list_of_files_is_written_anew():
    between = TEXT.split(list_modules.BEGIN)[1].split(list_modules.END)[0]
    assert between.strip() == list_modules.listed().strip(), "run python docs/list_modules.py"
