"""Measures what starting costs: imports and light commands in processor time, and a run's first step by the clock.

Processor time is hardly changed by other work on the machine. The first step is that of ``examples/recipes/tiny.yaml``
on one rank and on four, with the command's server for ranks and without it.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = {
    "import lightning.pytorch": "import lightning.pytorch",
    "import lightning_megatron": "import lightning_megatron",
    "all names of the package": "from lightning_megatron import *; import lightning_megatron.callbacks",
}
COMMANDS = {
    "--version": ["--version"],
    "--help": ["--help"],
    "show": ["show", "tp=2,pp=2,world=8"],
    "migrate": ["migrate", "megatron-args", "--devices", "1", "--", "--num-layers", "2", "--hidden-size", "8"],
    "a mistyped argument": ["fit", "--trainer.devcies", "2"],
}
RUN = ["--config", str(ROOT / "examples/recipes/tiny.yaml"), "--trainer.max_steps", "1", "--trainer.logger", "false"]
RUN += ["--trainer.enable_checkpointing", "false", "--trainer.limit_val_batches", "0"]


def seconds(command: list[str], **environment: str) -> tuple[float, float]:
    """The processor time and the time of the clock that a command takes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # where a run leaves its configuration
        subprocess.run(command, env={**os.environ, **environment}, cwd=folder, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, time.perf_counter() - start


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    python, command = [sys.executable, "-W", "ignore"], [sys.executable, "-m", "lightning_megatron"]
    sides = {name: [*python, "-c", code] for name, code in IMPORTS.items()}
    sides |= {f"lightning-megatron {name}": [*command, *words] for name, words in COMMANDS.items()}
    for name, words in sides.items():
        seen = [seconds(words)[0] for _ in range(rounds + 1)][1:]  # the first round compiles
        print(f"{name:42} {statistics.median(seen):6.2f} s of processor time")
    with tempfile.TemporaryDirectory() as folder:
        run = [*command, "fit", *RUN, "--data.cache_dir", folder]
        for devices, server in ((1, "1"), (4, "1"), (4, "0")):
            ranks = ["--trainer.devices", str(devices)]
            ranks += ["--trainer.strategy.tp", "1", "--trainer.strategy.pp", "1"] if devices == 1 else []
            seen = [seconds([*run, *ranks], LIGHTNING_MEGATRON_RANK_SERVER=server)[1] for _ in range(rounds + 1)][1:]
            how = "" if devices == 1 else ", from the server" if server == "1" else ", as copies of the command"
            print(f"fit of one step on {devices} rank(s){how:26} {statistics.median(seen):6.1f} s by the clock")


if __name__ == "__main__":
    main()
