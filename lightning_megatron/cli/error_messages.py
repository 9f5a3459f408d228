"""Makes one line of jsonargparse's message: the argument, what is wrong, and what to use instead."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
import re
from collections.abc import Iterable, Iterator
from typing import Any, get_type_hints

import yaml

from lightning_megatron.cli.no_argument import no_argument, takes_arguments
from lightning_megatron.distributed import signatures
from lightning_megatron.distributed.other_names import VALUE_NAMES
from lightning_megatron.distributed.suggestions import closest_name
from lightning_megatron.strategy.former_arguments import replacement

_A_NUMBER = re.compile(r"Expected a <class '(int|float)'>")  # what is meant more likely than a class
_NOTHING = ("<class 'NoneType'>", "<class 'str'>")
_NO_GPU = ("No supported gpu backend found", "`CUDAAccelerator` can not run on your system")  # Lightning's words


# The base of all callbacks, which jsonargparse tries behind the class that was given.
_TRIED_AS_BASE = re.compile(
    r"\n\s+- Problem with given class_path 'lightning\.Callback':\n\s+Option '\S+' is not accepted"
)
# A class that jsonargparse tries for arguments of another one, as ``ParameterGroups`` for those of AdamW, before it
# takes that other one for a function of the parameters.
_TRIED_BEFORE_FUNCTION = re.compile(
    r"'\S+':\n\s+Option '\S+' is not accepted\n\s+- Type .* expects a function or a callable class: "
    r"((?:.|\n)*?)\.? Got value: Namespace\(class_path='([^']+)'.*"
)


def explain(message: str, options: Iterable[str]) -> str:
    """One line in place of ``message``; the message itself if it is of no kind that this module knows.

    Args:
        message: jsonargparse's message.
        options: All option strings of the parser.
    """
    rules = (
        _unrecognized,
        _ambiguous,
        _no_choice,
        _not_accepted,
        _missing,
        _no_command,
        _no_file,
        _no_module,
        _no_class,
        _no_arguments,
        _not_expected,
    )
    message = _TRIED_BEFORE_FUNCTION.sub(_of_given_class, _TRIED_AS_BASE.sub("", message))
    for rule in rules:
        line = rule(message, list(options))
        if line:
            return line
    return message


def reason(message: str) -> str:
    """What a class's constructor raised, without the other types that jsonargparse tried."""
    if message.startswith(_NO_GPU):
        return (
            "--trainer.accelerator=gpu: torch finds no GPU on this machine. Use cpu to train here;"
            " lightning-megatron check looks at a run for GPUs anywhere"
        )
    found = re.search(r"^( *)Errors:\n((?:.|\n)*?)(?:\n\1Given value|\Z)", message, re.MULTILINE)
    if not found:
        return message
    tried = f"\n{found[2]}".split(f"\n{found[1]}  - ")[1:]
    told = [text for text in tried if not text.startswith("Expected a ")]
    return reason(told[0].replace(f"\n{found[1]}    ", "\n")) if told else message


def _of_given_class(found: re.Match[str]) -> str:
    """What jsonargparse says of the class that was given, without the one that it tried before."""
    return found[0] if found[1].startswith("Expected '") else f"'{found[2]}':\n{found[1]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the nearest of the ``known`` names; empty if none is near."""
    found = closest_name(name, known)
    return f"; did you mean {found}?" if found else ""


def _unrecognized(message: str, options: list[str]) -> str:
    found = re.search(r"unrecognized arguments: (--\S+)", message)
    if not found:
        return ""
    name = found[1].partition("=")[0]
    classes = re.findall(r"given class_path '(\S+)'", message[: found.start()])
    if classes:  # an argument of a class's argument
        group, _, leaf = name.removeprefix("--").rpartition(".")
        if told := _former(classes[-1], leaf, message):
            return told
        known = list(_parameters(classes[-1], group))
        return no_argument(_beginning(_key(message[: found.start()]), group), leaf, known, _name(classes[-1], group))
    parts = name.split(".")
    known = [option.removesuffix(".help") for option in options if option.count(".") < len(parts)]
    for count in range(len(parts), 0, -1):  # of a class's argument only the beginning is an option
        alike = [option for option in known if option.count(".") == count - 1]
        near = closest_name(".".join(parts[:count]), alike, similarity=0.8)
        if near:
            return f"there is no argument {name}; did you mean {'.'.join([near, *parts[count:]])}?"
    return f"there is no argument {name}"


def _ambiguous(message: str, _: list[str]) -> str:
    found = re.search(r"ambiguous option: --(\S+?)(?:=\S*)? could match (.+)", message)
    if not found:
        return ""
    key = _key(message)
    choices = " or ".join(name.strip().replace("--", f"--{key}.", 1) for name in found[2].split(","))
    return f"there is no argument --{key}.{found[1]}; did you mean {choices}?"


def _no_choice(message: str, _: list[str]) -> str:
    """A misspelled choice of an argument of several types: what the other types say of it would mislead."""
    found = re.search(r"Expected a typing\.Literal\[(.+)\]\. Got value: (\S+)", message)
    if not found:
        return ""
    known = re.findall(r"'([^']+)'", found[1])
    told = nearest(found[2], known) or f"; use one of {', '.join(known)}"
    return f"--{_key(message[: found.end()])}={found[2]} is unknown{told}"


def _not_accepted(message: str, options: list[str]) -> str:
    found = re.search(r"(?:Group '(\S+)' does not accept option|Option) '(\S+?)'(?: is not accepted)?", message)
    if not found:
        return ""
    group, name = found[1], found[2]
    classes = re.findall(r"given class_path '(\S+)'", message[: found.end()])
    if classes:
        if told := _former(classes[-1], name, message):
            return told
        known = list(_parameters(classes[-1], group))
        beginning = _beginning(_key(message[: found.end()]), group or "")
        return no_argument(beginning, name, known, _name(classes[-1], group))
    known = [option.removeprefix(f"--{group}.") for option in options if option.startswith(f"--{group}.")]
    return no_argument(_beginning(group or ""), name, known, "")


def _former(class_path: str, name: str, message: str) -> str:
    """What the strategy's constructor says of one of its former arguments; empty for any other argument."""
    from lightning_megatron.strategy import MegatronStrategy

    cls: Any = pydoc.locate(class_path)
    if not (isinstance(cls, type) and issubclass(cls, MegatronStrategy)):
        return ""
    found = re.search(rf"(?:key='{name}', val=|'{name}': |--\S*{name}[= ])('[^']*'|[^,}})\s]+)", message)
    return replacement(name, yaml.safe_load(found[1].strip("'")) if found else "...")


def _beginning(*groups: str) -> str:
    """The full name of a group of arguments, with which those of its arguments begin."""
    return "--" + "".join(f"{group}." for group in groups if group)


def _name(class_path: str, group: str | None) -> str:
    """The name of a class whose arguments were given; empty for those of one of its arguments."""
    return "" if group else class_path.rpartition(".")[2]


def _missing(message: str, _: list[str]) -> str:
    found = re.search(r"(?:following arguments are required: (.+)|Key \"(\S+)\" is required)", message)
    if not found:
        return ""
    names, inside = [name.strip() for name in (found[1] or found[2]).split(",")], _key(message[: found.start()])
    if inside:
        names = [f"--{inside}.{name}" for name in names]
    elif found[1]:
        names = [name if name.startswith("-") else f"--{name.partition('.')[2] or name}" for name in names]
    else:
        names = [f"--{'.'.join(filter(None, (_key(message), found[2])))}"]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} required; give it here or in a --config file"


def _no_command(message: str, _: list[str]) -> str:
    found = re.search(r"argument (?:subcommand|COMMAND): invalid choice: '(\S+)' \(choose from (.+)\)", message)
    if not found:
        return ""
    known = re.findall(r"'(\w+)'", found[2])
    return f"there is no command {found[1]}{nearest(found[1], known) or '; use ' + ', '.join(known)}"


def _no_file(message: str, _: list[str]) -> str:
    found = re.search(r'Parser key "(\S+)": File does not exist: \'(.+)\'', message)
    return f"--{found[1]}={found[2]}: there is no such file; check the path" if found else ""


def _no_module(message: str, _: list[str]) -> str:
    found = re.search(r"given class_path '(\S+)':\s+No module named '(\S+)'", message)
    if not found:
        return ""
    return (
        f"--{_key(message)}={found[1]}: Python finds no module {found[2]}; check its name, or put its folder into"
        " PYTHONPATH"
    )


def _no_class(message: str, _: list[str]) -> str:
    found = re.search(r"Expected a dot import path string: ([A-Za-z_]\S*)", message)
    if not found or _A_NUMBER.search(message):
        return ""
    from lightning.pytorch.strategies import StrategyRegistry

    known = sorted({cls.__name__ for base in _bases() for cls in _subclasses(base)})
    if found[1] in StrategyRegistry:  # names of ``Trainer(strategy=)``, which stand for an object without arguments
        cls = StrategyRegistry[found[1]]["strategy"].__name__
        return f"--{_key(message)}={found[1]} takes no arguments of its own; name the class instead: {cls}"
    near = closest_name(found[1], known, similarity=0.6)
    hint = f"; did you mean {near}?" if near else "; use a path such as package.module.Class"
    return f"--{_key(message)}={found[1]}: there is no such class{hint}"


def _bases() -> tuple[type, ...]:
    """The classes of which a run may name subclasses."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.strategies import Strategy

    data = (pl.LightningModule, pl.LightningDataModule, pl.Callback, Logger, Strategy)
    return (*data, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


def _not_expected(message: str, _: list[str]) -> str:
    expected = [text for text in re.findall(r"Expected a (.+?)(?:\. Got value|\n|$)", message) if text not in _NOTHING]
    expected = [text for text in expected if not text.startswith(("path but", "dot import path"))]  # what no value is
    other = re.search(r"Not of type \w+: (.+)", message)
    key = _key(message)
    if not key or not (expected or other):
        return ""
    values = re.findall(r"(?:Got value|Given value): (?!NestedArg)(.+)", message)
    value = f"={values[0]}" if values and len(values[0]) < 40 else ""
    ours = VALUE_NAMES.get(key.rpartition(".")[2], {}).get(values[0] if values else "")  # another tool's name of it
    if ours:
        return f"--{key}{value} is unknown; did you mean {ours}?"
    if expected:
        choices = " or ".join(dict.fromkeys(map(_readable, expected)))
        if key == "trainer.precision":  # Lightning's list has what megatron-core does not train with
            choices = re.sub(r" or '64(-true)?'|a whole number or ", "", choices)
        return f"--{key}{value}: use {choices}"
    return f"--{key}: {other[1].replace('Expected', 'use')}" if other else ""


def _no_arguments(message: str, _: list[str]) -> str:
    """A value in place of a class's arguments."""
    found = re.search(r"Not a valid subclass of \w+|Expected a dot import path string: (?![A-Za-z_])", message)
    if not found or _A_NUMBER.search(message):
        return ""
    value = re.search(r"Given value: (.+)", message[found.end() :])
    kinds = re.findall(r"Subtypes: \[<class '([\w.]+)'>(.*)", message[: found.start()])
    if not value or not kinds or not _key(message):
        return ""
    path, others = kinds[-1]
    if "], torch.optim.optimizer.Optimizer]" in others:  # what a Callable returns
        return f"--{_key(message)}={value[1]}: use the name of an optimizer, such as AdamW"
    name = path.rpartition(".")[2]
    if dataclasses.is_dataclass(pydoc.locate(path)):
        return takes_arguments(f"--{_key(message)}", value[1], name, _parameters(path, None))
    return f"--{_key(message)}={value[1]}: use the name of a {name}, and init_args for its arguments"


def _key(message: str) -> str:
    """The full name of the argument: the keys of nested parsers are relative to those around them."""
    return ".".join(re.findall(r'Parser key "([^"]+)"', message))


def _readable(kind: str) -> str:
    choices = re.fullmatch(r"typing\.Literal\[(.+)\]", kind)
    if choices:
        return choices[1].replace(", ", " or ")
    named = re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>", kind)
    if not named:
        return kind
    return {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "dict": "a mapping, as {name: value}",
        "list": "a list",
    }.get(named[1], named[1])


def _parameters(path: str, group: str | None) -> Iterator[str]:
    """The parameters of a class, or of the dataclass that is its argument ``group``."""
    found: Any = pydoc.locate(path)
    for part in filter(None, (group or "").split(".")):
        found = _class_of_argument(found, part) or found
    if dataclasses.is_dataclass(found):
        yield from (field.name for field in dataclasses.fields(found))
    else:
        yield from inspect.signature(found).parameters


def _class_of_argument(owner: Any, name: str) -> Any:
    try:
        return get_type_hints(owner.__init__).get(name)
    except NameError:  # a type that is imported for type checkers alone
        annotation = (signatures.arguments_of(f"{owner.__module__}.{owner.__name__}") or {}).get(name)
        path = signatures.class_in(annotation, owner.__module__)
        return pydoc.locate(path) if path else None


def _subclasses(base: type) -> Iterator[type]:
    cls: type
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)
