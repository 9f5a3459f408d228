"""The shell's completion of the command: what bash offers for a line, asked of bash itself."""

import re
import shlex
import subprocess
import sys

import pytest

from lightning_megatron.cli.main import main
from tests.support.pages import run, shell

# Calls what the script has registered for the command, with a line as bash would.
_ASK = """
source complete.bash
COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) COMPREPLY=()
$(complete -p lightning-megatron | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    (folder / "complete.bash").write_text(shell(folder, "lightning-megatron completion bash"))
    (folder / "run.yaml").touch()
    return folder


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ([""], {"fit", "validate", "test", "predict", "show", "import", "export", "preprocess", "completion"}),
        (["fit", "--trainer.strategy.p"], {"--trainer.strategy.pp", "--trainer.strategy.pipeline_split_rank"}),
        (["fit", "--trainer.strategy.recompute", ""], {"selective", "full"}),
        (["fit", "--trainer.strategy.checkpointing.async_save", "t"], {"true"}),
        (["fit", "--trainer.strategy", ""], {"MegatronStrategy"}),
        (["fit", "--trainer.max_st"], {"--trainer.max_steps"}),
        (["fit", "--model", "T"], {"T5Module"}),
        (["fit", "--model.config.hid"], {"--model.config.hidden_size", "--model.config.hidden_dropout"}),
        (["validate", "--data.global_b"], {"--data.global_batch_size"}),
        (["predict", "--trainer.callbacks", "Perp"], {"Perplexity"}),
        (["fit", "--config", "ru"], {"run.yaml"}),
        (["show", "--r"], {"--ranks-per-node"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_offers(line, offered, folder):
    words = " ".join(shlex.quote(word) for word in ["lightning-megatron", *line])
    assert offered <= set(run(folder, "bash", "-c", _ASK.format(words=words)).splitlines())


def test_only_what_fits_is_offered(folder):
    words = "lightning-megatron fit --trainer.strategy.tp"
    assert run(folder, "bash", "-c", _ASK.format(words=words)).split() == ["--trainer.strategy.tp"]


def test_another_shell(folder):
    assert shell(folder, "lightning-megatron completion zsh").startswith("#compdef lightning-megatron")
    with pytest.raises(AssertionError, match="error: .*fish"):
        shell(folder, "lightning-megatron completion fish")
    subprocess.run(["bash", "-n", folder / "complete.bash"], check=True)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    install = "needs shtab, which is not installed: pip install 'lightning-megatron[completion]'"
    with pytest.raises(SystemExit, match=re.escape(install)):
        main(["completion", "bash"])
