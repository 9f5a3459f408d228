"""The notebook of the documentation runs from its first cell to its last, in a kernel of its own."""

import nbformat
from nbclient import NotebookClient

from tests.support.pages import DOCS, ROOT


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(DOCS / "first_steps.ipynb", as_version=4)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    first, last = eval(cells[1].outputs[-1]["data"]["text/plain"])
    assert first > 5 > 4 > last
    assert "image/png" in cells[2].outputs[-1]["data"]
    assert cells[3].outputs[-1]["data"]["text/plain"].startswith("b'def __init__(self")
