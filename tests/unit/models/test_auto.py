"""``AutoModule`` finds the module of a family by the ``kind`` of its configuration; no table lists the families."""

import pytest

from lightning_megatron import AutoModule, GPTConfig, GPTModule
from lightning_megatron.hf import UnsupportedConfigError, family
from lightning_megatron.hf.families.llama import Llama
from lightning_megatron.models import configured_module
from tests.reference import pretrained


@pytest.fixture(autouse=True)
def families(monkeypatch):
    """What a test adds is forgotten after it."""
    monkeypatch.setattr(family, "_FAMILIES", dict(family._FAMILIES))
    monkeypatch.setattr(configured_module, "_BY_KIND", dict(configured_module._BY_KIND))


def llama_of(kind):
    type("Llama", (Llama,), {"model_type": "llama", "kind": kind})
    return pretrained.new_model("llama")


def test_a_family_of_the_users():
    class OtherConfig(GPTConfig):
        kind = "Other"

    class OtherModule(GPTModule):
        config_type = OtherConfig

    module = AutoModule.from_pretrained(llama_of("Other"))
    assert (type(module), type(module.config)) == (OtherModule, OtherConfig)
    with pytest.raises(UnsupportedConfigError, match=r"OtherModule.from_pretrained, or AutoModule.* not GPTModule's"):
        GPTModule.from_pretrained(llama_of("Other"))


def test_a_subclass_does_not_take_the_place_of_its_familys_module():
    class Tuned(GPTModule):
        pass

    class Wider(GPTModule):
        config_type = type("WiderConfig", (GPTConfig,), {})

    assert type(AutoModule.from_pretrained(llama_of("GPT"))) is GPTModule


def test_the_module_that_was_defined_last_under_its_name():
    for _ in range(2):  # a notebook's cell that runs twice

        class OtherModule(GPTModule):
            config_type = type("OtherConfig", (GPTConfig,), {"kind": "Other"})

    assert type(AutoModule.from_pretrained(llama_of("Other"))) is OtherModule


def test_a_kind_that_no_module_has():
    with pytest.raises(UnsupportedConfigError, match=r"Llama.kind is 'Gtp', .*there are Bert, GPT, T5. Correct it"):
        AutoModule.from_pretrained(llama_of("Gtp"))
