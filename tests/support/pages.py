"""The code of the documentation's pages, and how a reader would run it.

Blocks of ``python``, ``bash`` and ``yaml`` are run (``test_pages.py`` asks that of every page); ``sh`` is for
commands that need machines which a test does not have.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from lightning_megatron.distributed import rank_server
from tests.support.preloaded_python import executable

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# The console script that pip made, and where this tree was not installed what it would run; python is this one.
_SCRIPT = Path(sys.executable).with_name("lightning-megatron")
COMMAND = [sys.executable, *([str(_SCRIPT)] if _SCRIPT.is_file() else ["-m", "lightning_megatron"])]
_SHELL = """python() {{ {python} "$@"; }}
lightning-megatron() {{ {command} "$@"; }}
torchrun() {{ python -m torch.distributed.run "$@"; }}
"""


def blocks(page: str | Path, *kinds: str) -> list[str]:
    """The code of a page (of docs/, or a path), in its order: blocks of ``kinds``, by default python."""
    found = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    return [code for kind, code in found if kind in (kinds or ("python",))]


def path_of_test(name: str) -> Path:
    """The file of a test module that a page names, in whatever folder of the tests it lies."""
    (found,) = (ROOT / "tests").rglob(name)
    return found


def run(folder: Path, *command: str | Path, timeout: float = 240) -> str:
    """What a command says that ends well, in ``folder`` and a process of its own, whose python is preloaded."""
    # python is preloaded here, so that ranks start at once without the command's own server.
    preloaded = {"OMP_NUM_THREADS": "1", rank_server.OFF: "0"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **preloaded}
    started = [executable() if word == sys.executable else word for word in command]
    done = subprocess.run(started, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def shell(folder: Path, code: str) -> str:
    """What a block of bash says that ends well."""
    words = [executable() if word == sys.executable else word for word in COMMAND]
    return run(folder, "bash", "-ec", _SHELL.format(python=executable(), command=" ".join(words)) + code)


def script(folder: Path, code: str, name: str = "script.py") -> str:
    """What a block of Python says, as a script of its own."""
    (folder / name).write_text(code)
    return run(folder, sys.executable, name)


def names_of(page: str, folder: str | Path) -> dict:
    """The names that the page's Python leaves behind, run in this process as one script, in ``folder``."""
    os.chdir(folder)
    names: dict = {"__name__": "__main__"}
    for code in blocks(page):
        exec(compile(code, page, "exec"), names)
    return names
