"""A model of the user's own is told at once all that it lacks, before a step is run on it."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig

from lightning_megatron import LayoutError, MegatronModule, ModelChunk, ParallelLayout


class Linear(MegatronModule):
    """One layer, on one rank."""

    def build_model(self, pre_process, post_process, vp_stage):
        chunk = ModelChunk(self.transformer_config(hidden_size=8, **self.fields()))
        chunk.layer = self.layer(chunk.config)
        chunk.forward = lambda x, y=None: chunk.layer(x)
        return chunk

    def fields(self):
        return {}

    def layer(self, config):
        return torch.nn.Linear(8, 2)

    def loss(self, output, batch):
        return (output - batch["y"]).square().mean()


def test_missing_methods_are_listed_together_before_a_process_group_exists():
    class Empty(MegatronModule):
        pass

    with pytest.raises(MisconfigurationException) as error:
        Empty().check_layout(ParallelLayout(world_size=2, pp=2))
    message = str(error.value)
    assert message.startswith("Empty lacks methods that this run calls:\n  - build_model(self, pre_process")
    assert "\n  - loss(self, output, batch)" in message
    assert "\n  - sequence_length(self, batch): returns s of the hidden states [s, b, h]" in message
    assert "docs/own_model.md" in message
    with pytest.raises(MisconfigurationException) as error:
        Empty().check_layout(ParallelLayout(world_size=1))
    assert "sequence_length" not in str(error.value)
    Linear().check_layout(ParallelLayout(world_size=1))


def test_what_a_chunk_lacks_is_listed_together():
    class Torch(Linear):
        def build_model(self, pre_process, post_process, vp_stage):
            return torch.nn.Linear(8, 2)

    with pytest.raises(MisconfigurationException) as error:
        Torch().build()
    message = str(error.value)
    assert message.startswith(
        "Torch.build_model made a model that this run cannot train:\n  - Linear on pipeline stage 0"
    )
    assert "has no config, model_type, pre_process, post_process, set_input_tensor" in message
    assert "subclass of lightning_megatron.ModelChunk" in message


def test_a_configuration_of_another_run_is_named_field_by_field():
    class Own(Linear):
        def build_model(self, pre_process, post_process, vp_stage):
            return ModelChunk(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2))

    with pytest.raises(
        MisconfigurationException, match="calculate_per_token_loss=False where the run has True"
    ) as error:
        Own().build()
    assert "pipeline_dtype=None where the run has torch.float32" in str(error.value)
    assert "self.transformer_config(...)" in str(error.value)


@pytest.mark.parametrize("given", [None, {}])
def test_what_is_no_model_is_refused(given):
    class Nothing(Linear):
        def build_model(self, pre_process, post_process, vp_stage):
            return given

    with pytest.raises(MisconfigurationException, match=r"build_model returned (None|\{\}), and a torch.nn.Module"):
        Nothing().build()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layer": 2}, r"transformer_config\(num_layer=...\): no such field. Did you mean 'num_layers'\?"),
        ({"hidden_dropot": 0.1}, "Did you mean 'hidden_dropout'"),
        ({"activation": "gulu"}, "unknown activation 'gulu'. Did you mean 'gelu'"),
        ({"ffn_hidden_size": 0}, "ffn_hidden_size=0"),
    ],
    ids=str,
)
def test_fields_that_are_none(fields, message):
    class Wrong(Linear):
        def fields(self):
            return fields

    with pytest.raises(ValueError, match=message):
        Wrong().build()


def test_sizes_that_the_layout_cannot_divide():
    module = Linear()
    module.settings = Linear().build().settings.__class__(layout=ParallelLayout(world_size=3, tp=3))
    with pytest.raises(LayoutError, match="hidden_size=8 is not a multiple of tp=3"):
        module.transformer_config(hidden_size=8)


def test_a_layer_of_the_users_that_has_parallel_layers_in_it_is_built_called_and_predicted_with():
    class Inside(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            init = config.init_method
            self.up = ColumnParallelLinear(8, 16, config=config, init_method=init, gather_output=False)
            self.down = RowParallelLinear(
                16, 2, config=config, init_method=init, bias=True, input_is_parallel=True, skip_bias_add=False
            )

        def forward(self, x):
            return self.down(self.up(x)[0].relu())[0]

    class Wide(Linear):
        def layer(self, config):
            return Inside(config)

    module = Wide().build()
    weight = dict(module.named_parameters())["layer.up.weight"]
    assert 0.01 < float(weight.std()) < 0.03  # drawn by the configuration's method
    x = torch.ones(3, 8)
    assert module(x=x).shape == (3, 2)
    assert torch.equal(module.predict_step({"x": x}, 0), module(x=x))


def test_a_batch_that_is_no_dict_is_explained():
    with pytest.raises(TypeError, match=r"this batch is a list. Let the dataset return dicts.*override get_batch"):
        Linear().get_batch([torch.ones(3, 8), torch.ones(3)])


def test_a_call_takes_the_models_arguments_whatever_the_loaders_batches_are():
    class Tuples(Linear):
        def get_batch(self, batch):
            return {"x": batch[0], "y": batch[1]}

    module, x = Tuples().build(), torch.ones(3, 8)
    assert torch.equal(module(x=x), module.predict_step((x, None), 0))
