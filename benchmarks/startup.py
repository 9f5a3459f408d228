"""Measures what importing lightning_megatron adds to importing lightning.pytorch and megatron.core, in fresh processes.

It counts processor time, which other work on the machine hardly changes.
"""

import argparse
import os
import statistics
import subprocess
import sys

SIDES = {
    "import lightning.pytorch, megatron.core": "import lightning.pytorch, megatron.core",
    "then import lightning_megatron": "import lightning_megatron",
}
CLOCK = "start = time.process_time(); {}; print(time.process_time() - start)"


def seconds() -> list[float]:
    """The processor time of each statement, one after the other in a fresh process, in seconds."""
    program = "; ".join(["import time", *(CLOCK.format(statement) for statement in SIDES.values())])
    command = [sys.executable, "-W", "ignore", "-c", program]
    caching = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=caching).stdout
    return [float(line) for line in told.split()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    seen = [seconds() for _ in range(rounds + 1)][1:]  # the first round compiles, and warms the disk's cache
    for name, values in zip(SIDES, zip(*seen, strict=True), strict=True):
        print(f"{name}: {statistics.median(values):.3f} s of {', '.join(f'{x:.3f}' for x in values)}")
