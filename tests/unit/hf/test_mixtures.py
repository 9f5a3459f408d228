"""Models of transformers with experts: their settings, their files' matrices, and what cannot go out."""

import dataclasses
import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightning_megatron import AutoModule, Experts, GPTConfig, GPTModule
from lightning_megatron.cli.main import main
from lightning_megatron.distributed.layout import LayoutError, ParallelLayout
from lightning_megatron.hf import UnsupportedConfigError, WeightsError, family_of, open_source
from lightning_megatron.hf.expert_matrices import StackedExperts
from lightning_megatron.hf.meta_model import MetaModel
from lightning_megatron.hf.weight_mapping import ExpertColumns, Heads, assemble, take_apart, their_shapes
from tests.reference import hub_models

QWEN = "Qwen/Qwen3-30B-A3B"
SIZES = {
    "num_layers": 2, "hidden_size": 24, "num_attention_heads": 6, "num_query_groups": 2, "vocab_size": 50,
    "seq_length": 16, "position_embedding": "rope", "normalization": "RMSNorm", "activation": "swiglu", "bias": False,
    "tie_embeddings": False, "ffn_hidden_size": 40,
}  # fmt: skip


@pytest.fixture
def qwen(tmp_path):
    return hub_models.write(QWEN, tmp_path / "qwen")


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


# Settings


def test_the_router_is_balanced_where_transformers_balances_it(qwen):
    config = AutoModule.from_pretrained(qwen).config
    expected = Experts(num=6, top_k=3, ffn_hidden_size=16, balancing="none", aux_weight=0.02)
    assert config.experts == expected
    edit(qwen, output_router_logits=True, norm_topk_prob=False)
    found = AutoModule.from_pretrained(qwen).config.experts
    assert (found.balancing, found.normalize_top_k) == ("global_aux", False)


def test_some_settings_of_the_experts_change_and_the_others_stay(qwen):
    changed = AutoModule.from_pretrained(qwen, config={"experts": {"balancing": "seq_aux", "aux_weight": 0.5}})
    assert changed.config.experts == Experts(num=6, top_k=3, ffn_hidden_size=16, balancing="seq_aux", aux_weight=0.5)
    with pytest.raises(TypeError, match="Experts has no argument 'balance': did you mean balancing"):
        AutoModule.from_pretrained(qwen, config={"experts": {"balance": "none"}})


def test_a_gate_needs_what_it_is_the_gate_of():
    with pytest.raises(ValueError, match=r"shared_gate=True\) needs shared_ffn_hidden_size"):
        Experts(num=4, shared_gate=True)


def test_layers_without_experts_go_out_as_they_came(tmp_path):
    config = transformers.Qwen3MoeConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=5, num_attention_heads=6, head_dim=4,
        num_key_value_heads=2, moe_intermediate_size=16, num_experts=6, num_experts_per_tok=3, decoder_sparse_step=2,
        mlp_only_layers=[3], use_sliding_window=True, sliding_window=4,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "source")
    module = AutoModule.from_pretrained(tmp_path / "source")
    assert (module.config.experts.layers, module.config.sliding_window) == ([1], 4)
    module.save_pretrained(tmp_path / "out")
    out, source = tmp_path / "out", tmp_path / "source"
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    ours, theirs = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    module.config.experts = dataclasses.replace(module.config.experts, layers=[0, 2])
    fields = family_of("qwen3_moe").written(module.config)
    assert (fields["decoder_sparse_step"], fields["mlp_only_layers"]) == (1, [1, 3, 4])


def test_experts_with_biases_are_not_divided():
    config = GPTConfig(**{**SIZES, "bias": True}, experts=Experts(num=6))
    config.check(ParallelLayout(world_size=2, tp=2, etp=1, ep=2, sequence_parallel=True))
    with pytest.raises(LayoutError, match=r"etp=2 divides each expert.*Use MegatronStrategy\(etp=1\)"):
        config.check(ParallelLayout(world_size=2, tp=2, sequence_parallel=True))
    with pytest.raises(ValueError, match=r"shared_ffn_hidden_size=...\)\) needs bias=False"):
        GPTConfig(**{**SIZES, "bias": True}, experts=Experts(num=6, shared_ffn_hidden_size=8))


@pytest.mark.parametrize("in_turns", [True, False])
def test_columns_of_experts_are_read_in_parts(in_turns):
    """Of any rectangle of ours, as expert-parallel ranks ask for, and back to the bit."""
    mapped, heads = ExpertColumns("theirs", in_turns=in_turns), Heads(1, 1, 1)
    for shape in ((4, 6, 5), (4, 6)):
        stored = torch.randn(4, *reversed(shape[1:]))

        def read(name, offset, sizes, stored=stored):
            return stored[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))]

        assert their_shapes(mapped, shape, heads) == {"theirs": tuple(stored.shape)}
        whole = torch.empty(shape)
        assemble(mapped, shape, heads, (0,) * len(shape), whole, read)
        columns = stored.view(4, -1, 6)
        gates = columns[..., 0::2] if in_turns else columns[..., :3]
        assert torch.equal(whole.view(4, 6, -1)[:, :3], gates.transpose(1, 2))
        assert torch.equal(take_apart(mapped, whole, heads)["theirs"], stored)
        part = torch.empty(2, 3, *shape[2:])
        assemble(mapped, shape, heads, (1, 2, 0)[: len(shape)], part, read)
        assert torch.equal(part, whole[1:3, 2:5])


# Files


def test_a_matrix_that_is_missing_is_named(qwen):
    index = json.loads((qwen / "model.safetensors.index.json").read_text())["weight_map"]
    lost = "model.layers.3.mlp.experts.4.up_proj.weight"
    file = qwen / index[lost]
    weights = load_file(file)
    weights.pop(lost)
    save_file(weights, file, {"format": "pt"})
    says = "model.layers.3.mlp.experts.gate_up_proj: the matrix of expert 4 is missing"
    with pytest.raises(WeightsError, match=re.escape(says)):
        AutoModule.from_pretrained(qwen)
    weights[lost] = torch.ones(3, 24)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=re.escape(f"{lost} has shape (3, 24), and another expert's (16, 24)")):
        AutoModule.from_pretrained(qwen)


def test_no_more_is_read_than_is_asked_for(qwen):
    source = open_source(qwen)
    places = MetaModel(source.config, "Qwen3MoeForCausalLM").places(source.shapes)
    name, read = "model.layers.1.mlp.experts.gate_up_proj", []
    whole = StackedExperts(source, places).read(name, (0, 0, 0), (6, 32, 24))
    inner = source.read

    def noting(stored, offset, sizes):
        read.append((stored.removeprefix("model.layers.1.mlp.experts."), offset, sizes))
        return inner(stored, offset, sizes)

    source.read = noting
    part = StackedExperts(source, places).read(name, (2, 10, 3), (2, 10, 7))
    assert torch.equal(part, whole[2:4, 10:20, 3:10])
    assert read == [
        (f"{expert}.{kind}_proj.weight", (row, 3), (count, 7))
        for expert in (2, 3)
        for kind, row, count in (("gate", 10, 6), ("up", 0, 4))
    ]


def test_the_commands_import_and_export_experts(qwen, tmp_path, capsys):
    main(["import", str(qwen), str(tmp_path / "checkpoint")])
    main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "out")])
    capsys.readouterr()
    before = {name: tensor for file in qwen.glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# What goes out


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"experts": Experts(num=6, top_k=3)}),
        (
            "qwen3_moe",
            {"experts": Experts(num=6, top_k=3, ffn_hidden_size=16, layers=[1]), "extra": {"qk_layernorm": True}},
        ),
        (
            "olmoe",
            {
                "experts": Experts(num=6, top_k=3, normalize_top_k=False),
                "extra": {"qk_layernorm": True},
                "joint_qk_norm": True,
            },
        ),
    ],
)
def test_a_mixture_that_came_from_nowhere_finds_its_family(family, changes, tmp_path):
    module = GPTModule(GPTConfig(**{**SIZES, **changes}))
    module.save_pretrained(tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert back.config.model_type == family
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(input_ids=ids), back(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"router": "sigmoid"}, "Experts(router='sigmoid') cannot be saved as a mixtral"),
        ({"capacity_factor": 2.0}, "Experts(capacity_factor=2.0) cannot be saved as a mixtral"),
        ({"normalize_top_k": False}, "Experts(normalize_top_k=False) cannot be saved as a mixtral"),
        ({"layers": [1]}, "Experts(layers=[1]) cannot be saved as a mixtral, which has experts in all layers"),
        ({"shared_ffn_hidden_size": 8}, "Experts(shared_ffn_hidden_size=8) cannot be saved as a mixtral"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_experts_that_cannot_go_out_are_named(changes, says, tmp_path):
    module = GPTModule(GPTConfig(**SIZES, experts=Experts(**{"num": 6, "top_k": 3, **changes})))
    with pytest.raises(UnsupportedConfigError, match=re.escape(says)):
        module.save_pretrained(tmp_path / "out", family="mixtral")


def test_a_dense_model_is_no_mixtral(tmp_path):
    with pytest.raises(UnsupportedConfigError, match=r"experts=None\) cannot be saved as a mixtral, which has experts"):
        GPTModule(GPTConfig(**SIZES)).save_pretrained(tmp_path / "out", family="mixtral")
    module = GPTModule(GPTConfig(**SIZES, experts=Experts(num=6)))
    with pytest.raises(UnsupportedConfigError, match=r"experts=Experts\(num=6.*cannot be saved as a llama"):
        module.save_pretrained(tmp_path / "out", family="llama")
