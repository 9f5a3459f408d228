"""``Plan``: a run as ``lightning-megatron fit --config`` reads it, and what became of each setting it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml

from lightning_megatron.distributed.suggestions import closest_name

Given = Mapping[str, Any]  # settings by Megatron's names, with their values read
Fate = Literal["carried over", "Lightning's", "not needed", "yours to do", "not here"]


class MigrationError(ValueError):
    """A setting that cannot be read; the message names it and what to change."""


@dataclass(frozen=True)
class Line:
    """What became of one setting.

    Args:
        setting: Name of the setting in the other tool.
        value: The setting's value in that tool; None if it was not given and its default matters.
        fate: The outcome for the setting, in a word or two.
        says: The text about the setting: its place in the run, or why it has none.
        place: The setting's dotted place in the run, if it has exactly one.
    """

    setting: str
    value: Any
    fate: Fate
    says: str
    place: str | None = None

    def __str__(self) -> str:
        given = self.setting if self.value is None else f"{self.setting}={self.value}"
        return f"{given}: {self.fate}{'; ' if self.says else ''}{self.says}"


class Plan:
    """A run in the making.

    Args:
        source: The other tool's settings, in words, for the report.
        called: Returns the other tool's name of a setting, from Megatron's name.
    """

    def __init__(self, source: str, called: Callable[[str], str] = str) -> None:
        self.source = source
        self._called = called
        self.run: dict[str, Any] = {}
        self.lines: list[Line] = []

    def put(self, place: str, value: Any) -> None:
        """Set what is at a dotted place, such as ``trainer.max_steps``."""
        *parents, name = place.split(".")
        inside = self.run
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[name] = value

    def get(self, place: str, default: Any = None) -> Any:
        """Return what is at a dotted place of the run, or the default."""
        inside: Any = self.run
        for name in place.split("."):
            if not isinstance(inside, dict) or name not in inside:
                return default
            inside = inside[name]
        return inside

    def take_back(self, place: str, fate: Fate, says: str) -> None:
        """Leave out what was put at a dotted place, and say of the settings that were there what becomes of them."""
        parent, _, name = place.rpartition(".")
        self.get(parent, {}).pop(name, None)
        self.lines = [replace(line, fate=fate, says=says) if line.place == place else line for line in self.lines]

    def say(self, setting: str, value: Any, fate: Fate, says: str = "", place: str | None = None) -> None:
        """Add a line to the report."""
        self.lines.append(Line(self._called(setting), value, fate, says, place))

    @property
    def missing(self) -> list[Line]:
        """The lines of settings that are not supported here; the run does without them."""
        return [line for line in self.lines if line.fate == "not here"]

    def report(self) -> str:
        """A line for each setting, what needs a hand first."""
        order: tuple[Fate, ...] = ("not here", "yours to do", "carried over", "Lightning's", "not needed")
        lines = sorted(self.lines, key=lambda line: order.index(line.fate))
        return "\n".join([f"From {self.source}:", *(f"- {line}" for line in lines)])

    def yaml(self) -> str:
        """The run, with the report as comments."""
        comments = "".join(f"# {line}".rstrip() + "\n" for line in self.report().splitlines())
        order = ("seed_everything", "trainer", "model", "data")
        run = {name: _class_first(self.run[name]) for name in order if name in self.run}
        return comments + yaml.safe_dump(run, sort_keys=False, default_flow_style=None, width=110)


def _class_first(value: Any) -> Any:
    """``class_path`` before its ``init_args``, as people write it."""
    if isinstance(value, list):
        return [_class_first(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: _class_first(value[name]) for name in sorted(value, key=lambda name: name != "class_path")}


def take(
    given: Given,
    plan: Plan,
    names: tuple[str, ...],
    says: str | Callable[[str], str],
    place: str | None = None,
    fate: Fate = "carried over",
) -> dict[str, Any]:
    """Say what becomes of those settings in ``names`` that were given; returns them by name."""
    found = {name: given[name] for name in names if given.get(name) is not None}
    for name, value in found.items():
        plan.say(name, value, fate, says if isinstance(says, str) else says(name), place)
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest known name; empty if none is near."""
    near = closest_name(name, known, similarity=0.6)
    return f" Did you mean {near}?" if near else ""
