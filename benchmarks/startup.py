"""Measures ``import lightning_megatron`` against importing lightning.pytorch and megatron.core, in fresh processes."""

import argparse
import statistics
import subprocess
import sys

SIDES = {
    "import lightning_megatron": "import lightning_megatron",
    "import lightning.pytorch, megatron.core": "import lightning.pytorch, megatron.core",
}
CLOCK = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    """The seconds that a statement takes in a fresh process, without the start of the interpreter."""
    command = [sys.executable, "-W", "ignore", "-c", CLOCK.format(statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    seen: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(rounds + 1):
        for name, statement in SIDES.items():
            spent = seconds(statement)
            if number:  # the first round warms the disk's cache
                seen[name].append(spent)
    for name, values in seen.items():
        print(f"{name}: {statistics.median(values):.2f} s of {', '.join(f'{x:.2f}' for x in values)}")
    ours, theirs = (statistics.median(values) for values in seen.values())
    print(f"ratio of medians {ours / theirs:.3f}")
