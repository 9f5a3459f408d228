"""Makes the module, the data module and the Trainer of a run as ``fit`` does, without the run's devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from typing_extensions import override

from lightning_megatron import hf
from lightning_megatron.cli.check.yaml_sections import sections
from lightning_megatron.cli.error_messages import explain, reason
from lightning_megatron.cli.refused_arguments import raise_refusals
from lightning_megatron.cli.training import MegatronCLI
from lightning_megatron.cli.training import _Parser as _OneLineParser
from lightning_megatron.distributed import process_group_backends

_GPU = ("auto", "gpu", "cuda")
_OBJECTS = ("strategy", "callbacks", "plugins", "profiler")  # arguments of a Trainer that are made of classes
_FOUND_IN_RUN = ("last", "best", "hpc")  # checkpoints that a run finds itself
_FP8 = {"transformer-engine": "bf16-mixed", "transformer-engine-float16": "16-mixed"}  # as the states are kept


@dataclass
class RunParts:
    """What a run is made of; what could not be made is None, and ``faults`` or ``unreached`` says why.

    Args:
        module: The module, not connected to a Trainer yet.
        data: The data module.
        trainer: A Trainer on the CPU with as many ranks as the run has.
        devices: Ranks of each machine.
        device: "cuda" or "cpu", which the run is for.
        precision: As ``Trainer(precision=)`` has it, or "bf16-mixed" for fp8, whose states are the same.
        faults: What is wrong, a line each.
        unreached: Errors of what is not here: models and files.
    """

    module: pl.LightningModule | None = None
    data: pl.LightningDataModule | None = None
    trainer: pl.Trainer | None = None
    devices: int = 1
    device: str = "cuda"
    precision: str = "32-true"
    faults: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)

    def note(self, error: BaseException) -> None:
        """Keep the line of an error: as a fault, or as something that is not here."""
        line = reason(str(error)).strip() or type(error).__name__
        kept = self.faults
        if is_out_of_reach(error):
            kept, line = self.unreached, line.partition("\n")[0]
        if line not in kept:
            kept.append(line)


def is_out_of_reach(error: BaseException) -> bool:
    """Whether files or the network are what an error comes from; a machine of the run may have them."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False


def make_parts(arguments: list[str]) -> RunParts:
    """Parse the arguments of ``fit``, and make what they say; errors are kept in what is returned."""
    try:
        return _Maker(arguments).parts
    except _Refused as refused:
        return RunParts(faults=[str(refused), *refused.others])


class _Refused(Exception):
    """An argument that the parser does not take; ``others`` are those of other sections of the file."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.others: list[str] = []


class _Parser(_OneLineParser):
    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a type of several is tried
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [option for action in parser._actions for option in action.option_strings]
        raise _Refused(explain(message, options)) from ex


def _refused_sections(parser: Any, file: str) -> Iterator[str]:
    """What the parser says of each section of the file that it does not take."""
    path = Path(file)
    if not path.is_file():
        return
    for text in sections(path.read_text()).values():
        with TemporaryDirectory() as folder:
            alone = Path(folder) / path.name
            alone.write_text(text)
            try:
                parser.parse_args(["fit", "--config", str(alone)])
            except _Refused as refused:
                yield str(refused).replace(str(alone), file)


class _Maker(MegatronCLI):
    """Makes each part by itself, so that an error in one leaves the others."""

    parts: RunParts

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(args=["fit", *arguments], parser_class=_Parser, save_config_callback=None)

    @override
    def parse_arguments(self, parser: Any, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)  # Lightning's own warns of arguments that are not the process's
        except _Refused as refused:
            refused.others = [told for told in _refused_sections(parser, args[2]) if told != str(refused)]
            raise

    @override
    def instantiate_classes(self) -> None:
        self.parts = RunParts()
        settings = self.config["fit"]
        with hf.without_weights():
            self.parts.module = self._made("model")
        self.parts.data = self._made("data")
        path = settings.get("ckpt_path")
        if path and path not in _FOUND_IN_RUN and "://" not in str(path) and not Path(path).exists():
            self.parts.unreached.append(f"--ckpt_path={path}: there is no such checkpoint here.")
        if self._read_devices(settings.trainer):
            self._make_trainer(settings.trainer)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Train nothing: only what a run is made of is wanted."""

    def _made(self, *path: str) -> Any:
        """One object of the configuration, or None where there is none or it cannot be made."""
        alone = self.config.clone()
        run = alone["fit"]
        for name in ("model", "data"):
            run[name] = run.get(name) if path == (name,) else None
        for name in (*_OBJECTS, "logger"):
            run.trainer[name] = run.trainer.get(name) if path == ("trainer", name) else None
        try:
            found: Any = self.parser.instantiate_classes(alone)["fit"]
            raise_refusals(found.get("model"))
        except Exception as error:  # a constructor of the user's may raise anything
            self.parts.note(error)
            return None
        for name in path:
            found = found[name]
        return found

    def _read_devices(self, settings: Any) -> bool:
        """Read the devices of the run; whether their number can be one."""
        parts, accelerator = self.parts, settings.accelerator
        parts.device = "cpu" if accelerator == "cpu" else "cuda"
        if isinstance(accelerator, str) and accelerator not in (*_GPU, "cpu"):
            parts.faults.append(
                f"MegatronStrategy trains on CPU and CUDA devices; Trainer(accelerator={accelerator!r}). Use 'cpu' or"
                " 'gpu'."
            )
        parts.precision = _FP8.get(str(settings.precision), str(settings.precision or "32-true"))
        given = settings.devices
        if isinstance(given, str) and given.strip("-").isdigit():
            given = int(given)
        if isinstance(given, list):
            parts.devices = len(given)
        elif isinstance(given, str) and "," in given:
            parts.devices = len([number for number in given.split(",") if number.strip()])
        elif isinstance(given, int) and given > 0:
            parts.devices = given
        elif given in ("auto", -1):
            parts.devices = torch.cuda.device_count() or 1 if parts.device == "cuda" else 1
            if parts.device == "cuda":
                parts.unreached.append(
                    f"Trainer(devices={given!r}) takes every GPU of a machine, and was counted as {parts.devices} here."
                    " Check with --trainer.devices 8, or as many as a machine of the run has."
                )
        else:
            parts.faults.append(f"Trainer(devices={given!r}): use a number from 1, a list of numbers, or 'auto'.")
            return False
        return True

    def _make_trainer(self, settings: Any) -> None:
        """A Trainer of as many ranks on the CPU; a logger may begin a run of its own, and is not made."""
        self._take_back_end(settings.strategy)
        before = len(self.parts.faults)
        made = {name: self._made("trainer", name) for name in _OBJECTS}
        if len(self.parts.faults) > before:
            made = {name: value for name, value in made.items() if name == "strategy"}
            if made["strategy"] is None:
                return
        given = {**settings.as_dict(), **dict.fromkeys(_OBJECTS), **made, "logger": False, "accelerator": "cpu"}
        given |= {"devices": self.parts.devices}
        given["precision"] = _FP8.get(str(given["precision"]), given["precision"])
        given["plugins"] = [*(given["plugins"] or []), LightningEnvironment()]  # not SLURM's, of this shell
        try:
            self.parts.trainer = self.trainer_class(**given)
        except Exception as error:  # a Trainer raises errors of many types
            self.parts.note(error)

    def _take_back_end(self, strategy: Any) -> None:
        """Check the back end against the run's device, which is not this Trainer's."""
        arguments: Any = getattr(strategy, "init_args", None) or {}
        wanted = arguments.get("process_group_backend")
        if wanted in ("gloo", "nccl"):
            arguments["process_group_backend"] = None
            try:
                process_group_backends.choose(self.parts.device, wanted)
            except Exception as error:
                self.parts.note(error)
