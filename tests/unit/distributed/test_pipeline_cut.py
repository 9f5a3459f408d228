"""How many layers each pipeline stage has: what is read, what is refused, and what megatron-core's fields say."""

from __future__ import annotations

import re

import pytest
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from lightning_megatron.distributed.layout import LayoutError, ParallelLayout
from lightning_megatron.distributed.model_fit import check_model
from lightning_megatron.distributed.pipeline_cut import core_layout, of_core_fields, read

MODEL = {
    "num_layers": 8, "hidden_size": 96, "ffn_hidden_size": 384, "num_attention_heads": 16, "num_query_groups": 8
}  # fmt: skip


def layout(**sizes) -> ParallelLayout:
    return ParallelLayout.of_smallest_world(**sizes)


@pytest.mark.parametrize(
    ("given", "pp", "vp", "found"),
    [
        (None, 2, None, None),
        ("auto", 2, 2, "auto"),
        ([5, 3], 2, None, (5, 3)),
        ((0, 4, 4, 0), 4, None, (0, 4, 4, 0)),
        ([4, 2], 2, 2, (2, 1, 2, 1)),
        ([3, 1, 2, 0], 2, 2, (3, 1, 2, 0)),
        ([8], 1, None, (8,)),
        ("Ettt|ttL", 2, None, (3, 2)),
        ("E|(tt|)*2,L", 4, None, (0, 2, 2, 0)),
        ("Et*3|t*2 L", 2, None, (3, 2)),
        ("Et|(t|t)*2mL", 2, 2, (1, 1, 2, 1)),
    ],
)
def test_what_is_read(given, pp, vp, found):
    assert read(given, pp, vp) == found
    assert layout(pp=pp, vp=vp, layers_per_stage=given).layers_per_stage == found


@pytest.mark.parametrize("text", ["Ettt|ttL", "E|(tt|)*2,L", "Et*3|t*2L", "Et|(t|t)*2|tL", "(E)*1tt|(t)*3L"])
def test_the_text_means_what_it_means_to_megatron_core(text):
    theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert read(text, len(theirs), None) == tuple(stage.count(LayerType.decoder) for stage in theirs)


def test_one_stage_has_all_layers_whatever_they_take():
    assert layout(layers_per_stage="auto").layers_per_stage is None


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"pp": 2, "layers_per_stage": [4, 3, 1]}, "has 3 stages, and pp=2 need 2 numbers. Use [4, 4] for instance."),
        ({"pp": 2, "vp": 2, "layers_per_stage": [4, 3, 1]}, "pp=2, vp=2 need 4 numbers, or 2 multiples of vp."),
        ({"pp": 2, "vp": 2, "layers_per_stage": [4, 3]}, "3 layers are no multiple of vp=2. Give the 4 numbers"),
        ({"layers_per_stage": [4, 4]}, "has 2 stages, and pp=1 need 1 numbers"),
        ({"pp": 3, "layers_per_stage": [4, 0, 4]}, "a stage without layers does nothing"),
        ({"pp": 2, "layers_per_stage": [0, 0]}, "a stage without layers does nothing"),
        ({"pp": 2, "layers_per_stage": [4, -4]}, "layers_per_stage=[4, -4]: use a list"),
        ({"pp": 2, "layers_per_stage": [True, 4]}, "use a list with the number of layers of each stage, 'auto'"),
        ({"pp": 2, "layers_per_stage": 4}, "layers_per_stage=4: use a list"),
        ({"pp": 2, "layers_per_stage": "automatic"}, "layers_per_stage='automatic': use a list"),
        ({"pp": 2, "layers_per_stage": "tt|ttL"}, "E comes first, L last"),
        ({"pp": 2, "layers_per_stage": "Ettm|ttL"}, "m on the last stage"),
    ],
    ids=str,
)
def test_what_is_refused(sizes, says):
    with pytest.raises(LayoutError, match=re.escape(says)) as caught:
        layout(**sizes)
    assert str(caught.value).startswith("MegatronStrategy(")


def test_the_layers_must_be_the_models():
    with pytest.raises(LayoutError, match=re.escape("[5, 4] has 9 layers, and num_layers=8. Use [4, 4]")):
        check_model(layout(pp=2, layers_per_stage=[5, 4]), **MODEL)
    check_model(layout(pp=2, layers_per_stage=[5, 3]), **MODEL)


def test_layers_that_do_not_divide_can_be_given():
    message = "Use num_layers=6 or num_layers=9, or pp=1, or layers_per_stage=[3, 3, 2]."
    with pytest.raises(LayoutError, match=re.escape(message)):
        check_model(layout(pp=3), **MODEL)


def test_the_sizes_that_people_read_have_the_layers():
    assert layout(tp=2, pp=2, layers_per_stage=[5, 3]).sizes == "tp=2, pp=2, dp=1, layers_per_stage=[5, 3]"


@pytest.mark.parametrize(
    ("fields", "layers", "pp", "vp", "found"),
    [
        ({}, 8, 2, None, None),
        ({"account_for_loss_in_pipeline_split": False, "rotary_interleaved": True}, 8, 2, None, None),
        ({"num_layers_in_first_pipeline_stage": 2}, 8, 4, None, (2, 2, 2, 2)),
        ({"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3}, 8, 4, None, (1, 2, 2, 3)),
        ({"num_layers_in_last_pipeline_stage": 2}, 10, 3, 2, (2, 2, 1, 2, 2, 1)),
        ({"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}, 6, 4, None,
         (1, 2, 2, 1)),
        ({"account_for_loss_in_pipeline_split": True}, 11, 2, 3, (2, 2, 2, 2, 2, 1)),
        ({"pipeline_model_parallel_layout": "Ett|tL"}, 3, 2, None, (2, 1)),
        ({"pipeline_model_parallel_layout": [["embedding", "decoder"], ["decoder", "loss"]]}, 2, 2, None, (1, 1)),
    ],
)  # fmt: skip
def test_megatron_cores_fields(fields, layers, pp, vp, found):
    assert of_core_fields(fields, layers, pp, vp) == found


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_layers_in_first_pipeline_stage": 3}, "num_layers=8 cannot be shared out so over pp=4"),
        ({"num_layers_in_first_pipeline_stage": 9}, "cannot be shared out so"),
        ({"account_for_loss_in_pipeline_split": True}, "cannot be shared out so"),
        (
            {"account_for_loss_in_pipeline_split": True, "num_layers_in_first_pipeline_stage": 2},
            "these say it twice",
        ),
        ({"pipeline_model_parallel_layout": [1]}, "use megatron-core's text"),
    ],
)
def test_fields_that_do_not_fit(fields, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        of_core_fields(fields, 8, 4, None)


def test_megatron_core_gives_each_stage_its_layers():
    core = PipelineParallelLayerLayout(core_layout([0, 3, 2, 1], 1), 2)
    core.validate_layer_layout(6, 1)
    assert [[len(core.get_layer_id_list(vp_stage=0, pp_rank=rank)) for rank in range(2)]] == [[0, 3]]
    assert core.flatten_layout[-2:] == [LayerType.mtp, LayerType.loss]
