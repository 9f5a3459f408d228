"""Imports modules by the names that they had before the package was laid out in nine folders.

An import by a former name gives the module and a DeprecationWarning. The names go with release 0.2.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

_PACKAGE = "lightning_megatron."
FORMER = {
    "checkpoint.export": "checkpoint.consolidate",
    "flops": "models.flops",
    "generation": "models.generation",
    "groups": "distributed.process_groups",
    "harness": "models.gpt.lm_eval",
    "hf.families.rotary": "hf.families.rope",
    "hf.fields": "hf.config_reader",
    "hf.pieces": "hf.weight_mapping",
    "layout": "distributed.layout",
    "lora": "models.lora",
    "lora.config": "models.lora.config",
    "migration": "cli.migrate",
    "modules": "models",
    "modules.bert_config": "models.bert.config",
    "modules.configured": "models.configured_module",
    "modules.gpt_config": "models.gpt.config",
    "modules.model_config": "models.model_config",
    "modules.t5_config": "models.t5.config",
    "parameter_groups": "training.parameter_groups",
    "precision": "strategy.precision",
    "schedule": "training.lr_schedule",
    "training_cli": "cli.training",
}


class _FormerNames(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        former = name.removeprefix(_PACKAGE)
        if former == name or (former not in FORMER and former.rpartition(".")[0] not in _PACKAGES):
            return None
        if former not in FORMER:  # or the parent's folder would be searched, and a second copy of a module made
            raise ModuleNotFoundError(f"{name} is in {_PACKAGE}{FORMER[former.rpartition('.')[0]]} now.", name=name)
        return spec_from_loader(name, self)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        now = _PACKAGE + FORMER[name.removeprefix(_PACKAGE)]
        warnings.warn(f"{name} is {now} now; the old name goes with release 0.2.", DeprecationWarning, stacklevel=2)
        sys.modules[name] = import_module(now)


_PACKAGES = {name for name in FORMER if "." not in name}


def keep_former_names() -> None:
    """Let the modules be imported by their former names, too."""
    sys.meta_path.insert(0, _FormerNames())
