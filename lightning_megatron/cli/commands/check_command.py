"""``lightning-megatron check``: whether a run can start, which needs none of its devices."""

from __future__ import annotations

import argparse
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the arguments; further ones are ``fit``'s, and come in ``given.more``."""
    parser.add_argument(
        "file", metavar="run.yaml", help="the run, as fit --config takes it; fit's arguments may follow"
    )
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="GB of each GPU, against which memory is held")
    parser.add_argument("--no-data", action="store_true", help="leave the data alone; read no batch")
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    parser.set_defaults(more=[])


def run(given: argparse.Namespace) -> None:
    """Print what was found, and end the process: status 0, 1 with faults, or 2 where not all could be checked."""
    from lightning_megatron.cli.early_check import find_faults

    if faults := find_faults(["--config", given.file, *given.more]):  # told without importing anything heavy
        from lightning_megatron.cli.check.result import RunCheck

        result = RunCheck(given.file, faults=faults)
    else:
        from lightning_megatron.cli.check.run_check import check_run

        result = check_run(given.file, given.more, given.gpu_memory, read_data=not given.no_data)
    print(json.dumps(result.as_dict(), indent=2) if given.json else result)
    sys.exit(result.exit_status)
