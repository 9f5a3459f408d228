"""Each block of code in docs/checkpoints.md runs, one after the other in one folder, as a reader would run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).parents[1]


def test_the_code_of_the_page_runs(tmp_path):
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    blocks = re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL)
    # The command of pyproject.toml, also where the package is not installed.
    shell = f'lightning-megatron() {{ {sys.executable} -c "from lightning_megatron.cli import main; main()" "$@"; }}\n'
    for kind, code in blocks:
        command = [sys.executable, tmp_path / "block.py"] if kind == "python" else ["bash", "-ec", shell + code]
        (tmp_path / "block.py").write_text(code)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, f"{code}\n{run.stderr[-3000:]}"
    assert len(blocks) == 3
    assert {"last.ckpt", "step=4.ckpt"} <= set(os.listdir(tmp_path / "kept"))
    with safe_open(tmp_path / "gpt.safetensors", "pt") as exported:
        assert exported.get_tensor("decoder.final_layernorm.weight").shape == (32,)


def test_the_tests_that_the_page_names_are_there():
    named = 0
    for line in (ROOT / "docs" / "checkpoints.md").read_text().splitlines():
        file = ""
        for page, name in re.findall(r"`(\w+\.py)?::(test_\w+)\.*`", line):
            file = page or file
            assert f"\ndef {name}" in (ROOT / "tests" / file).read_text(), (file, name)
            named += 1
    assert named >= 20
