"""What differs between releases of megatron-core is found in the one that is installed."""

import logging

import pytest
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp

from lightning_megatron.distributed.megatron_versions import dense_mlp_submodules
from lightning_megatron.distributed.warning_filters import _IGNORED_RECORDS


@pytest.mark.parametrize(
    "spec",
    [get_gpt_layer_local_spec(), bert_layer_local_spec, decoder_model_with_local_spec()],
    ids=["gpt", "bert", "t5"],
)
def test_the_linear_layers_of_a_dense_layer(spec):
    mlp = dense_mlp_submodules(spec)
    assert (mlp.linear_fc1, mlp.linear_fc2) == (ColumnParallelLinear, RowParallelLinear)


def test_another_kind_of_layer_has_none():
    spec = get_gpt_layer_local_spec()
    spec.submodules.mlp = IdentityOp
    assert dense_mlp_submodules(spec) is None


@pytest.mark.parametrize("module", _IGNORED_RECORDS)
def test_announcements_to_developers_are_not_shown(module, caplog):
    logger = logging.getLogger(f"megatron.core.{module}")
    logger.warning(_IGNORED_RECORDS[module] + ", and more")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
