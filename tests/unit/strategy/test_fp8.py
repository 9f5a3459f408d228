"""fp8 is refused where nothing would multiply in it."""

import pytest
from lightning.pytorch import LightningModule

from lightning_megatron import BertConfig, BertModule, GPTConfig, GPTModule, MegatronPrecision

SIZES = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9, "seq_length": 4}


@pytest.mark.parametrize(
    "module", [GPTModule(GPTConfig(**SIZES)), BertModule(BertConfig(**SIZES)), LightningModule()], ids=repr
)
def test_layers_that_do_not_multiply_in_fp8(module):
    with pytest.raises(
        Exception, match=r"has none here. Use a GPTModule with GPTConfig\(layers='transformer_engine'\)"
    ):
        MegatronPrecision("transformer-engine").check_module(module, True)
    MegatronPrecision("bf16-mixed").check_module(module, True)


def test_layers_that_do():
    module = GPTModule(GPTConfig(**SIZES, layers="transformer_engine"))
    MegatronPrecision("transformer-engine").check_module(module, True)


def test_precisions_without_fp8_take_no_recipe():
    with pytest.raises(Exception, match="only 'transformer-engine' multiplies in fp8"):
        MegatronPrecision("bf16-mixed", recipe=object())
    with pytest.raises(Exception, match="no fp8 recipe like object"):
        MegatronPrecision("transformer-engine", recipe=object())
    assert MegatronPrecision("transformer-engine-float16", 2.0**8).initial_loss_scale == 256
