"""Finds arguments that do not exist or cannot be right, on the command line and in YAML, and imports nothing heavy.

It reads the sources of the classes that a run names. What it is not sure of it leaves to jsonargparse, which knows
everything and takes seconds to say it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import lightning_megatron
from lightning_megatron.cli.auto_module_help import NAMES as AUTO_MODULES
from lightning_megatron.cli.no_argument import no_argument, takes_arguments
from lightning_megatron.cli.trainer_values import wrong_accelerator, wrong_devices
from lightning_megatron.distributed import signatures
from lightning_megatron.distributed.suggestions import closest_name

_OURS = "lightning_megatron.MegatronStrategy"  # of a run that names no strategy
TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
# The arguments of the commands that train; ``verbose`` and ``return_predictions`` are of some of them only.
TOP = {
    "ckpt_path", "config", "data", "help", "lr_scheduler", "model", "optimizer", "print_config", "return_predictions",
    "seed_everything", "trainer", "verbose", "weights_only",
}  # fmt: skip
_OF_A_CLASS = {"class_path", "init_args", "dict_kwargs", "help"}
_STRATEGY = ("trainer", "strategy")
_SLOTS = {_STRATEGY, ("model",), ("data",)}  # where a class is named, and arguments of its own follow
_CALLBACKS = ("trainer", "callbacks")  # of which each is such a class
_VALUES = {"accelerator": wrong_accelerator, "devices": wrong_devices}  # of the Trainer, before it can be asked

Path_ = tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """A name that was given.

    Args:
        path: The names from the top.
        value: Its value if that is plain.
        place: The file and line; empty for the command line.
        is_list: Whether it is a list in a file.
    """

    path: Path_
    value: str | None
    place: str = ""
    is_list: bool = False

    @property
    def is_option(self) -> bool:
        return not self.place


@dataclass
class Run:
    """What the command line and its files give.

    Args:
        entries: The names, in order.
        named_in_files: Where a file has a ``class_path``, beside which arguments are in ``init_args``.
        faults: What is wrong with the files themselves, in words.
        classes: The classes that are named, by where; where several are, which one counts is jsonargparse's to say.
        is_whole: Whether all that is given has been read; what has not may name other classes.
    """

    entries: list[_Entry] = field(default_factory=list)
    named_in_files: set[Path_] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    classes: dict[Path_, set[str]] = field(default_factory=dict)
    is_whole: bool = True

    def add(self, entry: _Entry) -> None:
        """Take one more name, and the class that it may give."""
        self.entries.append(entry)
        if entry.path[-1] == "class_path" and not entry.is_option:
            self.named_in_files.add(entry.path[:-1])
        slot = _without_init_args(entry.path)
        if slot[-1] == "class_path":
            slot = slot[:-1]
        elif slot == ("trainer",):  # in a file of its own, or as JSON
            slot = _STRATEGY
        elif not _is_slot(slot) or entry.path[-1] == "init_args":
            return
        if entry.value:
            self.classes.setdefault(slot, set()).add(_path(entry.value) or entry.value)

    def class_at(self, slot: Path_) -> str:
        """The class that is surely the one of a place; empty where that is not known."""
        named = self.classes.get(slot) or ({_OURS} if slot == _STRATEGY else set())
        return next(iter(named)) if len(named) == 1 and self.is_whole else ""

    @property
    def devices(self) -> int:
        """The devices of a machine that ``MegatronStrategy`` is given by number; 1 where another strategy is chosen."""
        last = self._last("devices") if self._has_our_strategy else None
        return int(last.value) if last is not None and last.value is not None and last.value.isdigit() else 1

    @property
    def may_name_module(self) -> bool:
        """Whether it names a module, in full or by an abbreviation, or what has not been read may; help needs none."""
        whole = ("model", "help", "print_config")
        named = any(name.startswith(entry.path[0]) for entry in self.entries for name in whole)
        return named or not self.is_whole or any(entry.path[-1] == "help" for entry in self.entries)

    @property
    def asks_for_auto_module(self) -> bool:
        """Whether the help of ``AutoModule`` is asked for."""
        return any(entry.path == ("model", "help") and entry.value in AUTO_MODULES for entry in self.entries)

    def find_faults(self) -> list[str]:
        """The names that surely do not exist, values that cannot be right, and files that cannot be read, in words."""
        wrong: list[Path_] = []
        told = list(self.faults)
        for entry in self.entries:
            if any(entry.path[: len(path)] == path for path in wrong):
                continue  # what belongs to a wrong name
            if fault := _fault(entry, self):
                wrong.append(entry.path)
                told.append(fault)
        return list(dict.fromkeys([*told, *self._wrong_values()]))

    @property
    def _has_our_strategy(self) -> bool:
        return self.class_at(_STRATEGY).rpartition(".")[2] == "MegatronStrategy"

    def _last(self, name: str) -> _Entry | None:
        """What counts of an argument of the Trainer that may be given several times."""
        given = [entry for entry in self.entries if entry.path == ("trainer", name)]
        return given[-1] if given else None

    def _wrong_values(self) -> Iterator[str]:
        for name, find in _VALUES.items():
            last = self._last(name) if self._has_our_strategy else None
            if last is not None and last.value is not None and (fault := find(last.value)):
                dashes = "--" if last.is_option else ""
                yield f"{last.place}{dashes}trainer.{name}={last.value}: {fault}"


def find_faults(arguments: Sequence[str]) -> list[str]:
    """The names that surely do not exist, values that cannot be right, and files that cannot be read, each in words.

    Args:
        arguments: The arguments of ``fit`` or its kin, without the command.
    """
    return read(arguments).find_faults()


def read(given: Sequence[str]) -> Run:
    """Read the arguments of ``fit`` or its kin, and the files that they name.

    Args:
        given: The arguments, without the command.
    """
    run, arguments = Run(), list(given)
    while arguments:
        word = arguments.pop(0)
        if word in ("-h", "--help"):
            run.add(_Entry(("help",), None))
        if not word.startswith("-") or word in ("-h", "--help"):
            continue
        option, equals, value = word.partition("=")
        if not equals:
            value = arguments.pop(0) if arguments and not arguments[0].startswith("--") else ""
        if option in ("-c", "--config"):
            _read_file(value, run)
        elif option.startswith("--"):
            run.add(_Entry(tuple(option[2:].rstrip("+").split(".")), value))
    return run


def _read_file(name: str, run: Run) -> None:
    path = Path(name).expanduser()
    if not path.is_file():
        if "{" in name or "://" in name or path.exists() or _is_yaml_itself(name):  # jsonargparse reads all these
            run.is_whole = False
            return
        others = [str(each) for pattern in ("*.yaml", "*.yml") for each in path.parent.glob(pattern)]
        below = sorted(str(each) for each in path.parent.glob(f"*/{path.name}"))
        near = below[0] if below else closest_name(str(path), others)
        run.faults.append(f"--config {name}: there is no such file{f'; did you mean {near}?' if near else ''}")
        return
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        if _is_json(text):  # with tabs, which YAML does not take
            run.is_whole = False
            return
        mark = getattr(error, "problem_mark", None)
        line = f"{mark.line + 1}:{mark.column + 1}:" if mark else ""
        run.faults.append(f"{name}:{line} this is no YAML: {getattr(error, 'problem', None) or error}")
        return
    if isinstance(tree, yaml.MappingNode):
        for entry in _entries(tree, (), name):
            run.add(entry)
    else:
        what = "is empty" if tree is None else "is no mapping"
        run.faults.append(f"{name} {what}; a run has the keys trainer, model and data there")


def _is_yaml_itself(text: str) -> bool:
    """Whether ``--config`` is given the settings themselves, or "-" for those of the standard input."""
    try:
        return text == "-" or isinstance(yaml.compose(text), yaml.MappingNode)
    except yaml.YAMLError:
        return False


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _entries(mapping: yaml.MappingNode, above: Path_, name: str) -> Iterator[_Entry]:
    for key, value in mapping.value:
        if key.value == "<<":  # YAML's merge of one mapping or several into this one
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(merged, yaml.MappingNode):
                    yield from _entries(merged, above, name)
        elif isinstance(key.value, str):
            path = (*above, *key.value.rstrip("+").split("."))  # callbacks+ adds to those of an earlier file
            plain = value.value if isinstance(value, yaml.ScalarNode) else None
            is_list = isinstance(value, yaml.SequenceNode)
            yield _Entry(path, plain, f"{name}:{key.start_mark.line + 1}: ", is_list)
            parts = [(path, value)]
            if isinstance(value, yaml.SequenceNode) and path == _CALLBACKS:
                parts = [((*path, str(number)), each) for number, each in enumerate(value.value)]
            for at, each in parts:
                if isinstance(each, yaml.MappingNode):
                    yield from _entries(each, at, name)


def _is_slot(path: Path_) -> bool:
    return path in _SLOTS or (path[:-1] == _CALLBACKS and path[-1].isdigit())


def _without_init_args(path: Path_) -> Path_:
    """The path as options have it; in YAML, the arguments of a class are in its ``init_args``."""
    return tuple(name for name in path if name != "init_args")


def _fault(entry: _Entry, run: Run) -> str | None:
    """Say what is wrong with the last name of an entry; earlier ones are entries of their own, or of options."""
    if entry.path in (("model",), ("model", "class_path")) and entry.value in AUTO_MODULES[:-1]:
        return (
            f"{entry.place}{'.'.join(entry.path)}: {entry.value} makes a module by a method: write {AUTO_MODULES[-1]}"
        )
    at: Path_ = ()
    known: dict[str, Any] | None = dict.fromkeys(TOP)
    owner, module, has_fields = "", "", False
    for number, name in enumerate(entry.path):
        if known is None:
            return None
        if _is_slot(at) and name in _OF_A_CLASS:
            if name != "init_args":
                return None
            continue
        shown = entry.path[:number]
        if not entry.is_option and _is_slot(at) and shown == at and at in run.named_in_files:
            return f"{entry.place}{'.'.join(entry.path)} is beside class_path: put {name} under init_args"
        if at == _CALLBACKS:
            if entry.is_option and name.isdigit():
                return (
                    f"--trainer.callbacks.{name}: an option adds a callback, and takes no number; write"
                    " --trainer.callbacks+=NAME, and behind it --trainer.callbacks.ARGUMENT"
                )
            if entry.is_option:
                return None  # an argument of the callback that the option before it has added
            at = (*at, name)
            owner, module, known = _class(_path(run.class_at(at)))
            continue
        if owner and at != ("trainer",) and name in _OF_A_CLASS:
            return None  # a dataclass that is named, as classes are
        if name not in known:
            return _unknown_name(entry, number, known, owner, run)
        at = (*at, name)
        path = _class_path(at, known[name], module, run)
        owner, module, known = ("", "", {}) if at == _CALLBACKS else _class(path)
        has_fields = path is not None and signatures.is_dataclass(path)
    if known and (has_fields or at == ("trainer",) or entry.path[-1] == "init_args") and (value := _no_mapping(entry)):
        place = ("--" if entry.is_option else "") + ".".join(entry.path)
        return f"{entry.place}{takes_arguments(place, value, owner, known)}"
    return None


def _unknown_name(entry: _Entry, number: int, known: dict[str, Any], owner: str, run: Run) -> str | None:
    """Say that there is no argument of an entry's name at ``number``, and which was meant."""
    name, is_last = entry.path[number], number + 1 == len(entry.path)
    if entry.is_option and (name == "help" or (is_last and any(each.startswith(name) for each in known))):
        return None  # jsonargparse takes abbreviations
    beginning = ("--" if entry.is_option else "") + "".join(f"{part}." for part in entry.path[:number])
    if home := _home(name, run, entry.is_option):
        dashes = "--" if entry.is_option else ""
        return f"{entry.place}there is no argument {beginning}{name}; it is {dashes}{home}{name}"
    return f"{entry.place}{no_argument(beginning, name, known, owner, entry.value if is_last else ...)}"


def _class_path(at: Path_, annotation: Any, module: str, run: Run) -> str | None:
    """The class whose arguments are behind a name, or None where it is not known without an import."""
    if at == ("trainer",):
        return TRAINER
    if at in _SLOTS:
        return _path(run.class_at(at))
    if at in run.classes:  # another class than that of the annotation
        return None
    return signatures.class_in(annotation, module)


def _no_mapping(entry: _Entry) -> str:
    """The value of an entry, if it surely is neither a mapping nor what may stand for one: a file, a class, nothing."""
    if entry.is_list:
        return "a list"
    try:
        value = yaml.safe_load(entry.value or "")
    except yaml.YAMLError:
        return ""
    if value is None or isinstance(value, dict):
        return ""
    if isinstance(value, str) and ("." in value or value in _short_names() or Path(value).is_file()):
        return ""
    return entry.value or ""


def _class(path: str | None) -> tuple[str, str, dict[str, Any] | None]:
    """The name of a class, the module that defines it, and its arguments; None where they are not sure."""
    if path is None:
        return "", "", None
    source = signatures.find_class(*_parted(path))
    return path.rpartition(".")[2], source.module if source else "", signatures.arguments_of(path)


def _home(name: str, run: Run, is_option: bool) -> str:
    """The only group that has an argument of this very name; empty if there is none, or several."""
    groups: dict[str, dict[str, Any]] = {"trainer.": signatures.arguments_of(TRAINER) or {}}
    for slot in _SLOTS:
        _, module, arguments = _class(_path(run.class_at(slot)))
        group = ".".join([*slot, *([] if is_option else ["init_args"]), ""])
        groups[group] = arguments or {}
        groups[f"{group}config."] = _class(signatures.class_in(groups[group].get("config"), module))[2] or {}
    found = [group for group, arguments in groups.items() if name in arguments]
    return found[0] if len(found) == 1 else ""


def _parted(path: str) -> tuple[str, str]:
    module, _, name = path.rpartition(".")
    return module, name


@functools.cache
def _short_names() -> dict[str, str]:
    """The classes of this package that files may name without their module."""
    found = dict.fromkeys(lightning_megatron.__all__, "lightning_megatron")
    for room in ("data", "callbacks"):
        module = f"lightning_megatron.{room}"
        found |= dict.fromkeys(signatures.names_imported_by(module), module)
    return found


def _path(name: str) -> str | None:
    """The full name of a class of this package or of Lightning; None for another's."""
    if name.startswith(("lightning_megatron.", "lightning.pytorch.")):
        return name
    return f"{_short_names()[name]}.{name}" if name in _short_names() else None
