"""Each block of code in docs/checkpoints.md runs, one after the other in one folder, as a reader would run it."""

import os
import re

from safetensors import safe_open

from tests.support.pages import DOCS, blocks, path_of_test, script, shell


def test_the_code_of_the_page_runs(tmp_path):
    train, resume = blocks("checkpoints.md")
    script(tmp_path, train)
    script(tmp_path, resume)
    (export,) = blocks("checkpoints.md", "bash")
    shell(tmp_path, export)
    assert {"last.ckpt", "step=4.ckpt"} <= set(os.listdir(tmp_path / "kept"))
    with safe_open(tmp_path / "gpt.safetensors", "pt") as exported:
        assert exported.get_tensor("decoder.final_layernorm.weight").shape == (32,)


def test_the_tests_that_the_page_names_are_there():
    named = 0
    for line in (DOCS / "checkpoints.md").read_text().splitlines():
        file = ""
        for page, name in re.findall(r"`(\w+\.py)?::(test_\w+)\.*`", line):
            file = page or file
            assert f"\ndef {name}" in path_of_test(file).read_text(), (file, name)
            named += 1
    assert named >= 20
