"""The subcommand ``lightning-megatron migrate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_megatron.cli.migrate.accelerate import environment_of_this_process, from_accelerate
from lightning_megatron.cli.migrate.megatron_lm import from_command_line
from lightning_megatron.cli.migrate.plan import MigrationError, Plan

MEGATRON_ARGS = "megatron-args"


def run(given: argparse.Namespace) -> None:
    """Print the run, or write it, and what became of each setting; exit with 1 where something is not here."""
    plan = _plan(given)
    if given.out is None:
        print(plan.yaml(), end="")
    else:
        path = Path(given.out)
        if path.exists() and not given.overwrite:
            raise MigrationError(f"{path} is there already. Add --overwrite, or choose another --out.")
        path.write_text(plan.yaml())
        print(f"{plan.report()}\n{path}")
    if plan.missing:
        what = ", ".join(line.setting for line in plan.missing)
        sys.exit(f"lightning-megatron: the run does without {what}, which has no counterpart here yet; see above.")


def _plan(given: argparse.Namespace) -> Plan:
    if given.source != MEGATRON_ARGS:
        if given.behind:
            raise MigrationError(f"{given.behind[0]}: only `migrate {MEGATRON_ARGS} -- ...` takes arguments.")
        environment = environment_of_this_process() if given.environment else {}
        return from_accelerate(given.source, given.model, environment)
    if not given.behind:
        raise MigrationError(f"Give Megatron-LM's arguments behind --: migrate {MEGATRON_ARGS} -- --num-layers 24 ...")
    return from_command_line(given.behind, given.model or "gpt", devices=given.devices, num_nodes=given.num_nodes)
