"""What a release needs: a version that the changelog has, and a page on PyPI whose links lead somewhere."""

import importlib.util
import re

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import lightning_megatron
from tests.support.pages import ROOT

_spec = importlib.util.spec_from_file_location("setup_of_the_package", ROOT / "setup.py")
setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup)

README = (ROOT / "README.md").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()
LINK = re.compile(r"\]\(([^)#]*)[^)]*\)")


def test_the_changelog_has_the_version():
    version = lightning_megatron.__version__
    first = re.findall("^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert str(Version(version)) == version
    expected = "Unreleased" if Version(version).is_devrelease else rf"{re.escape(version)} \(20\d\d-\d\d-\d\d\)"
    assert re.fullmatch(expected, first)


def test_links_of_the_page_lead_to_files_of_this_version():
    address = "https://example.org/owner/lightning-megatron"
    links = LINK.findall(setup.page(README, address, "1.2.3"))
    inside = [link.removeprefix(f"{address}/blob/v1.2.3/") for link in links if link.startswith(address)]
    assert len(inside) > 20
    assert all((ROOT / path).is_file() for path in inside)
    assert all(link.startswith("https://") for link in links)
    assert all(link.startswith(address) for link in setup.addresses(address).values())


def test_without_an_address_the_page_has_no_link_to_nowhere():
    page = setup.page(README, "", "1.2.3")
    assert all(link.startswith("https://") for link in LINK.findall(page))
    assert "[CONTRIBUTING" not in page
    assert "CONTRIBUTING.md has all of them" in page
    assert setup.addresses("") == {}


def test_releases_that_are_refused_by_name():
    (lightning,) = (Requirement(said) for said in re.findall('"(lightning[><=].*)"', PROJECT))
    assert [version for version in ("2.6.1", "2.6.2", "2.6.3", "2.6.4") if version in lightning.specifier] == [
        "2.6.1", "2.6.4"
    ]  # fmt: skip


def test_workflows_run_scripts_that_exist():
    for workflow in (ROOT / ".github/workflows").glob("*.yml"):
        jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
        steps = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
        scripts = [script for step in steps for script in re.findall(r"(?<!\S)\.ci/\w+", step)]
        assert scripts, workflow
        assert all((ROOT / script).stat().st_mode & 0o100 for script in scripts)
