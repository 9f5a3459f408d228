"""Tests stand in the folder of what they need, and lean on helpers, not on one another."""

import re

from tests.support.pages import ROOT

TESTS = ROOT / "tests"
KINDS = {"unit", "trainer", "ranks", "parity", "faults", "docs"}
ROOMS = {path.name for path in (ROOT / "lightning_megatron").iterdir() if path.is_dir()}


def test_each_test_stands_in_a_folder_of_its_kind_and_room():
    for path in TESTS.rglob("test_*.py"):
        kind, *rooms = path.relative_to(TESTS).parts[:-1]
        assert kind in KINDS, path
        assert set(rooms) <= ROOMS, path


def test_names_of_test_files_are_unique_so_that_pages_may_name_them():
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_no_test_module_is_imported_by_another():
    for path in TESTS.rglob("*.py"):
        assert not re.search(
            r"^\s*(from|import) tests\S*\.test_|^\s*from tests\S* import .*\btest_", path.read_text(), re.M
        )


def test_unit_tests_start_no_ranks():
    for path in (TESTS / "unit").rglob("test_*.py"):
        assert "run_ranks(" not in path.read_text().replace('"run_ranks("', ""), path
