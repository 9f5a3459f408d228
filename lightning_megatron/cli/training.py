"""``MegatronCLI``: Lightning's command line, with this project's strategy, modules and data at hand."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_megatron.checkpoint import CheckpointError
from lightning_megatron.cli.error_messages import explain, reason
from lightning_megatron.cli.refused_arguments import raise_refusals
from lightning_megatron.distributed import crash_report
from lightning_megatron.distributed.layout import LayoutError
from lightning_megatron.hf import UnsupportedConfigError


class _Parser(LightningArgumentParser):
    """An argument parser whose errors are one line."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [option for action in parser._actions for option in action.option_strings]
        package = sys.modules["__main__"].__package__
        command = parser.prog.replace(" [options]", "").replace("__main__.py", f"python -m {package}")
        sys.stderr.write(f"error: {explain(message, options)}\nSee {command} --help\n")
        sys.exit(2)


class MegatronCLI(LightningCLI):
    """``LightningCLI`` whose strategy is ``MegatronStrategy`` unless another is named, and whose errors are one line.

    Args:
        model_class: Class of the module, or the base of those that ``--model`` may name.
        datamodule_class: Class of the data module, or the base of those that ``--data`` may name.
        args: The command's arguments; by default those of this process.
        **options: Further arguments of ``LightningCLI``.
    """

    def __init__(
        self,
        model_class: Any = None,
        datamodule_class: Any = None,
        args: ArgsType = None,
        **options: Any,
    ) -> None:
        options.setdefault("parser_class", _Parser)
        options.setdefault("save_config_kwargs", {"overwrite": True})  # else a run could not go on where it was
        defaults = {"strategy": {"class_path": "lightning_megatron.MegatronStrategy"}}
        options["trainer_defaults"] = {**defaults, **options.get("trainer_defaults", {})}
        super().__init__(model_class, datamodule_class, args=args, **options)

    @override
    def instantiate_classes(self) -> None:
        with _one_line(ValueError, TypeError, OSError, ImportError, MisconfigurationException):
            super().instantiate_classes()
            raise_refusals(self.model)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        with _one_line(LayoutError, MisconfigurationException, CheckpointError, UnsupportedConfigError):
            super()._run_subcommand(subcommand)


@contextmanager
def _one_line(*kinds: type[Exception]) -> Iterator[None]:
    """Errors that say themselves what to change end the process without a traceback; JSONARGPARSE_DEBUG=1 shows it."""
    try:
        yield
    except kinds as error:
        if os.environ.get("JSONARGPARSE_DEBUG"):
            raise
        sys.exit(1 if crash_report.tell(error) else f"error: {reason(str(error))}")
