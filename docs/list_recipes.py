"""Rewrite the tables of recipes.md: what ``lightning-megatron check`` says of each command in examples/recipes/*.yaml.

    python docs/list_recipes.py [--check]

The commands are those in the comments at the head of a recipe, one for each number of GPUs. Models on the hub are
described by tests/assets/published_models.json, so that no network is needed. ``--check`` changes nothing, and ends
with status 1 if the page is out of date.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from lightning_megatron.cli.check.result import RunCheck
from lightning_megatron.cli.check.run_check import check_run

ROOT = Path(__file__).parents[1]
RECIPES = sorted(file for file in (ROOT / "examples/recipes").glob("*.yaml") if file.stem != "tiny")
PUBLISHED = json.loads((ROOT / "tests/assets/published_models.json").read_text())  # by name: parameters and config.json
PAGE = ROOT / "docs/recipes.md"
BEGIN, END = "<!-- begin: python docs/list_recipes.py -->\n", "<!-- end -->\n"
_COMMAND = re.compile(r"^# +(\d+) GPUs?( with low-rank updates)?: (.*)$", re.MULTILINE)


@dataclass
class Run:
    """One command of a recipe.

    Args:
        recipe: The YAML file.
        gpus: The number of GPUs that its comment names.
        kind: What else the comment says of it, such as " with low-rank updates".
        command: The command.
    """

    recipe: Path
    gpus: int
    kind: str
    command: str

    @property
    def arguments(self) -> list[str]:
        """The options behind ``--config FILE``."""
        words = shlex.split(self.command)
        return words[words.index("--config") + 2 :]

    def check(self, gpu_memory: float | None = None) -> RunCheck:
        """What ``lightning-megatron check`` says of it."""
        return check_run(self.recipe, self.arguments, gpu_memory=gpu_memory, read_data=False)


def runs(recipe: Path) -> list[Run]:
    """The commands in the comments of a recipe."""
    return [Run(recipe, int(gpus), kind, command) for gpus, kind, command in _COMMAND.findall(recipe.read_text())]


@contextmanager
def published_models() -> Iterator[None]:
    """Inside, the hub has the configurations of the published models, and nothing else."""
    before = constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE
    with tempfile.TemporaryDirectory() as folder:
        for name, model in PUBLISHED.items():
            cached = Path(folder) / f"models--{name.replace('/', '--')}"
            (cached / "snapshots/1").mkdir(parents=True)
            (cached / "snapshots/1/config.json").write_text(json.dumps(model["config"]))
            (cached / "refs").mkdir()
            (cached / "refs/main").write_text("1")
        constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = folder, True
        try:
            yield
        finally:
            constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = before


def listed(checked: list[tuple[Run, RunCheck]]) -> str:
    """The table, and the commands of each recipe."""
    lines = [
        "| recipe | parameters, and those that a token uses | GPUs | layout | GB per GPU | tokens a step |",
        "|---|---|---|---|---|---|",
    ]
    shown = None
    for run, result in checked:
        first, shown = run.recipe != shown, run.recipe
        name = f"[{run.recipe.stem}](#{_anchor(run.recipe.stem)})" if first else ""
        parameters = f"{result.num_parameters:,}" if first else ""
        parameters += f", {result.num_active:,}" if first and result.num_active else ""
        lines.append(
            f"| {name} | {parameters} | {run.gpus} | {_layout(run, result)} |"
            f" {result.memory.largest.total / 1e9:.0f} | {result.tokens:,} |"
        )
    for recipe in dict.fromkeys(run.recipe for run, _ in checked):
        lines += ["", f"### {recipe.stem}", "", *_about(recipe), "", "```sh"]
        for run, _ in checked:
            if run.recipe == recipe:
                lines += [f"# {run.gpus} GPU{'s' * (run.gpus > 1)}{run.kind}", *_wrapped(run.command)]
        lines.append("```")
    return "\n".join(lines)


def _anchor(title: str) -> str:
    return title.replace(".", "")  # as mkdocs makes it


def _about(recipe: Path) -> list[str]:
    """The comments at the head of a recipe, but for its commands."""
    lines = [line[2:] for line in recipe.read_text().splitlines() if line.startswith("# ") and not _COMMAND.match(line)]
    text = " ".join(lines).partition("Data: ")
    data = [f"`{text[2]}` makes the data of a folder of text."] if text[2] else []
    return [f"{text[0].strip()}", *data]


def _layout(run: Run, result: RunCheck) -> str:
    layout = result.layout
    names = ("tp", "pp", "vp", "cp", "ep", "etp", "dp")
    sizes = [f"{name}={value}" for name in names if (value := getattr(layout, name) or 1) > 1]
    if isinstance(layout.layers_per_stage, tuple):
        sizes.append(f"layers {' + '.join(map(str, layout.layers_per_stage))}")
    sizes.append(f"micro-batches of {result.micro_batches[0]}")
    return ", ".join(sizes) + (", LoRA" if run.kind or run.recipe.stem.endswith("lora") else "")


def _wrapped(command: str) -> list[str]:
    """A command in lines of at most 100 columns, which a shell joins."""
    lines = [""]
    for word in re.findall(r"'[^']*'|\S+", command):
        if lines[-1] and len(lines[-1]) + len(word) > 98:
            lines[-1] += " \\"
            lines.append(f"    {word}")
        else:
            lines[-1] += f"{' ' if lines[-1] else ''}{word}"
    return lines


def rewritten(text: str, checked: list[tuple[Run, RunCheck]]) -> str:
    """The page with the tables of these runs."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{listed(checked)}\n\n{END}", text, flags=re.DOTALL)


def main() -> int:
    """Rewrite the tables, or check them."""
    with published_models():
        checked = [(run, run.check()) for recipe in RECIPES for run in runs(recipe)]
    text = PAGE.read_text()
    new = rewritten(text, checked)
    if "--check" not in sys.argv:
        PAGE.write_text(new)
    elif new != text:
        print(f"The tables of {PAGE} are out of date: run python docs/list_recipes.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
