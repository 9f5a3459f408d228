"""The documentation site builds with no broken link, page or reference."""

import os
import re
import subprocess
import sys

from tests.support.pages import DOCS, ROOT, blocks


def test_it_builds(tmp_path):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "JUPYTER_PLATFORM_DIRS": "1"}
    environment |= {"REPOSITORY_URL": "https://example.org/us/it", "REPOSITORY_EDIT_URI": "edit/main/docs/"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert built.returncode == 0, built.stderr[-4000:]
    pages = {path.parent.name for path in (tmp_path / "site").rglob("index.html")}
    assert {path.stem for path in DOCS.glob("*.md")} - {"index"} < pages
    reference = (tmp_path / "site/reference/index.html").read_text()
    assert all(f'id="lightning_megatron.{name}"' in reference for name in _public())
    told = re.sub("<[^>]+>", "", reference)
    assert (
        "MegatronStrategy(\n    *,\n    tp: int = 1,\n    pp: int = 1,\n" in told
    )  # signatures have a line an argument
    assert "kernels: Kernels = Kernels()," in told  # and the values of defaults that the code names
    assert 'href="https://example.org/us/it/edit/main/docs/lora.md"' in (tmp_path / "site/lora/index.html").read_text()


def _public() -> list[str]:
    text = (ROOT / "lightning_megatron/__init__.py").read_text().split("__all__ = [")[1].split("]")[0]
    return [name for name in re.findall(r'"(\w+)"', text) if name != "__version__"]


def test_a_broken_link_is_found(tmp_path):
    """That the build above can fail: the same settings, and a page with a link to nowhere."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[nowhere](nowhere.md) and [no heading](index.md#none)\n")
    settings = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[0]
    settings = re.sub(r"\nplugins:.*?(?=\nmarkdown_extensions)", "", settings, flags=re.DOTALL)
    (tmp_path / "mkdocs.yml").write_text(settings)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert built.returncode != 0
    assert "nowhere.md" in built.stderr
    assert "none" in built.stderr


def test_the_code_of_the_first_page_fits_its_column():
    """80 characters are what the theme's column holds where it has room for both of its side columns."""
    for page in ("index.md", "../README.md"):
        for code in blocks(page):
            assert max(map(len, code.splitlines())) <= 80, page


def test_no_cache_of_a_notebook_is_in_the_source():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    assert not re.findall(r"^.*(?:\.ipynb_checkpoints|\.cache|jupyter_cache)/.*$", listed, re.MULTILINE)
