"""Completes the ``lightning-megatron`` command in a shell, by a script that shtab writes.

jsonargparse's own script for shells (4.53) does not end: it follows classes that take classes of their own kind.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NoReturn, get_args, get_origin

import lightning.pytorch as pl
from jsonargparse import ArgumentParser
from typing_extensions import override

import lightning_megatron.callbacks
from lightning_megatron import AutoModule, MegatronStrategy
from lightning_megatron.cli.training import MegatronCLI
from lightning_megatron.data import ChatDataModule, HFDataModule, MegatronDataModule, TextDataModule
from lightning_megatron.distributed import extras
from lightning_megatron.models.configured_module import known_modules

_MODULES = tuple(known_modules().values())
_DATA = (TextDataModule, MegatronDataModule, HFDataModule, ChatDataModule)
_NAMES = {
    "--trainer.strategy": [MegatronStrategy.__name__],
    "--trainer.callbacks": [*pl.callbacks.__all__, *lightning_megatron.callbacks.__all__],
    "--trainer.logger": ["true", "false", *pl.loggers.__all__],
    "--model": [*(module.__name__ for module in _MODULES), "lightning_megatron.AutoModule.from_pretrained"],
    "--data": [data.__name__ for data in _DATA],
}


def script(shell: str, root: argparse.ArgumentParser, training: Mapping[str, argparse.ArgumentParser]) -> str:
    """What a shell reads to complete the command.

    Args:
        shell: "bash", "zsh" or "tcsh".
        root: The command's parser.
        training: The command's parsers of ``fit`` and its kin, which have no options yet; they are added here.

    Raises:
        ModuleNotFoundError: shtab is not installed.
    """
    extras.require("shtab", "completion", "lightning-megatron completion")
    import shtab

    for command, parser in _parsers_of_training().items():
        empty = training[command]
        for action in [*_plain(parser), *_of_classes()]:
            options = [option for option in action.option_strings if option not in empty._option_string_actions]
            if options:
                told = (str(action.help or "").splitlines() or [""])[0].replace("%", "%%")
                given: Any = empty.add_argument(*options, help=told, choices=_choices(action) or None)
                if any("path" in option or option == "--config" for option in options):
                    given.complete = shtab.FILE
    return str(shtab.complete(root, shell))


def _parsers_of_training() -> dict[str, argparse.ArgumentParser]:
    """The real parsers of ``fit`` and the like."""
    found: dict[str, argparse.ArgumentParser] = {}

    class Unparsed(MegatronCLI):
        @override
        def parse_arguments(self, parser: Any, args: Any) -> NoReturn:
            found.update(next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices)
            raise StopIteration

    argv, sys.argv = sys.argv, sys.argv[:1]  # which LightningCLI warns about, beside args
    try:
        Unparsed(args=[])
    except StopIteration:
        return found
    finally:
        sys.argv = argv
    raise RuntimeError("LightningCLI did not parse its arguments.")


def _plain(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    return (action for action in parser._actions if action.option_strings and action.help != argparse.SUPPRESS)


def _of_classes() -> Iterator[argparse.Action]:
    """The options of this project's classes, which the real parsers know only once a class is chosen."""
    for prefix, classes in (("trainer.strategy", (MegatronStrategy,)), ("model", _MODULES), ("data", _DATA)):
        for each in classes:
            parser = ArgumentParser()
            parser.add_class_arguments(each, prefix)
            yield from _plain(parser)
    parser = ArgumentParser()
    parser.add_method_arguments(AutoModule, "from_pretrained", "model")
    yield from _plain(parser)


def _choices(action: argparse.Action) -> list[str]:
    """What may follow an option: the names of a Literal, true and false, or classes."""
    if named := _NAMES.get(action.option_strings[0]):
        return named
    kind = getattr(action, "_typehint", None)  # private (jsonargparse 4.53); without it there are no choices
    kinds = get_args(kind) if get_origin(kind) is not Literal else (kind,)
    if kind is bool or bool in kinds:
        return ["true", "false"]
    return [str(name) for each in kinds if get_origin(each) is Literal for name in get_args(each)]
