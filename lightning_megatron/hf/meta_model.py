"""Asks transformers' own model, built without weights, which fields it reads and how files name its tensors.

Lists of fields and names would be out of date with the next version; what is derived here is the installed version's.
"""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Iterable, Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import PreTrainedConfig

from lightning_megatron.hf.file_places import Place
from lightning_megatron.hf.weight_mapping import Shape

# Read where weights are loaded, not where the model is built or run.
_READ_AT_LOADING = frozenset({"quantization_config", "compression_config"})


class MetaModel:
    """A model of transformers whose tensors have shapes and no numbers.

    Args:
        config: Configuration of the model.
        architecture: Name of the model's class, such as "LlamaForCausalLM".
    """

    def __init__(self, config: PreTrainedConfig, architecture: str) -> None:
        self._config, self._names = _watched(config)
        self._class = class_named(architecture)
        self._without_numbers = FakeTensorMode()

    @cached_property
    def model(self) -> transformers.PreTrainedModel | None:
        """None where transformers has no such class, or cannot make it of the configuration."""
        if self._class is None:
            return None
        try:
            with self._without_numbers:
                return self._made(self._class).eval()
        except Exception:
            return None

    def _made(self, kind: type[transformers.PreTrainedModel]) -> transformers.PreTrainedModel:
        try:
            with torch.device("cpu"):
                return kind(self._config)
        except DataDependentOutputException:  # first weights that are drawn until they fit, as ModernBERT's
            with torch.device("meta"):  # where none are drawn
                model = kind(self._config)
            model.to_empty(device="cpu")
            model.tie_weights()
            return model

    @cached_property
    def fields_read(self) -> frozenset[str] | None:
        """Fields of the configuration that are read while the model is built and run; None where it cannot be."""
        if self.model is None:
            return None
        width = self._config.hidden_size
        sides = ("inputs_embeds", "decoder_inputs_embeds") if self._config.is_encoder_decoder else ("inputs_embeds",)
        said = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # classifiers warn that they find no padding in embeddings
        try:
            with self._without_numbers, torch.device("cpu"), torch.no_grad():
                self.model(**{side: torch.empty(1, 4, width, device="cpu") for side in sides}, use_cache=False)
        except Exception:
            return None
        finally:
            transformers.logging.set_verbosity(said)
        return frozenset(self._names) | _READ_AT_LOADING

    def places(self, stored: Iterable[str]) -> dict[str, Place]:
        """Which tensor of the model each tensor of a file is, or is a part of; unknown ones keep their names."""
        names = list(stored)
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

            mapping = get_model_conversion_mapping(self.model)
            renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
            converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
            prefix = self.model.base_model_prefix  # type: ignore[union-attr]
            known = self.model.state_dict()  # type: ignore[union-attr]
            found = {}
            for name in names:
                renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
                if pattern is None:
                    found[name] = Place(renamed)
                    continue
                (converter,) = (each for each in converters if pattern in each.source_patterns)
                in_list, _ = rename_source_key(name, renamings, [], prefix, known)
                found[name] = _in_stack(renamed, in_list, pattern, converter) or Place(name)
            return found
        except (ImportError, AttributeError):  # no such model, or another version's transformers
            return {name: Place(name) for name in names}

    def stored_places(self, shapes: Mapping[str, Shape]) -> dict[str, Place]:
        """What ``save_pretrained`` calls the model's tensors of these shapes, or parts of them; see ``places``."""
        try:
            from transformers.core_model_loading import revert_weight_conversion

            tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            return self.places(revert_weight_conversion(self.model, tensors))
        except (ImportError, AttributeError):  # as in places
            return {name: Place(name) for name in shapes}

    def ignored(self, names: Iterable[str]) -> set[str]:
        """Which of the tensors that the model does not have transformers leaves out without a word."""
        left = SimpleNamespace(missing_keys=set(), unexpected_keys=set(names))
        everything = set(left.unexpected_keys)
        try:
            self.model._adjust_missing_and_unexpected_keys(left)  # type: ignore[union-attr]
        except AttributeError:
            return set()
        return everything - left.unexpected_keys


def class_named(architecture: str) -> type[transformers.PreTrainedModel] | None:
    """transformers' class of that name, if there is one."""
    found = getattr(transformers, architecture, None) if re.fullmatch(r"[A-Za-z]\w*", architecture) else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _watched(config: PreTrainedConfig) -> tuple[PreTrainedConfig, set[str]]:
    """A copy that notes the names of its fields as they are read."""
    names: set[str] = set()
    kind: Any = type(config)

    def read(self: Any, name: str) -> Any:
        names.add(name)
        return kind.__getattribute__(self, name)

    body = {"__getattribute__": read, "__module__": kind.__module__}
    watching = types.new_class(kind.__name__, (kind,), exec_body=lambda scope: scope.update(body))
    copied = copy.deepcopy(config)
    copied._experts_implementation = "batched_mm"  # of its ways, one that needs no numbers
    object.__setattr__(copied, "__class__", watching)
    names.clear()
    return copied, names


def _in_stack(name: str, in_list: str, pattern: str, converter: Any) -> Place | None:
    """The place of an expert's matrix in the tensor ``name``; None where it is made in another way.

    Args:
        name: The model's tensor.
        in_list: The matrix, as one of a list of experts.
        pattern: transformers' pattern of such names; ``*`` stands for the expert's number.
        converter: transformers' conversion.
    """
    made = [(type(each).__name__, each.dim) for each in converter.operations if hasattr(each, "dim")]
    number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), in_list)
    stacks = made in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
    if number is None or not stacks or len(made) != len(converter.operations):
        return None
    return Place(name, int(number[1]), converter.source_patterns.index(pattern), len(converter.source_patterns))
