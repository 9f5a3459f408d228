"""Draw the curves of runs from Lightning's ``metrics.csv``: the pictures of ``docs/examples.md``."""

import argparse
import csv
from pathlib import Path

from matplotlib import pyplot

LABELS = {"train_loss": "training", "val_loss": "validation", "val_accuracy": "validation"}


def main() -> None:
    """Draw each metric of each run into one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path, help="the .png to write")
    parser.add_argument("runs", nargs="+", help="metrics.csv of a run, or NAME=metrics.csv")
    parser.add_argument("--title", required=True)
    parser.add_argument("--metrics", nargs="+", default=["train_loss", "val_loss"])
    parser.add_argument("--ylabel", default="loss")
    args = parser.parse_args()

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for run in args.runs:
        name, _, path = run.rpartition("=")
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for metric in args.metrics:
            # Lightning counts steps from 0, and leaves a field empty where a row has no such value.
            points = [(int(row["step"]) + 1, float(row[metric])) for row in rows if row[metric]]
            label = ", ".join(part for part in (name, LABELS.get(metric, metric)) if part)
            marker = "o" if metric.startswith("val") else None  # validations are few
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
    axes.set(title=args.title, xlabel="step", ylabel=args.ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
