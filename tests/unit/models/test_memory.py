"""``ParallelLayout.memory`` against the weights that are built and the tensors that torch saves."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from lightning_megatron import (
    BertConfig,
    BertModule,
    Experts,
    GPTConfig,
    GPTModule,
    Kernels,
    LatentAttention,
    LoRA,
    ParallelLayout,
    T5Config,
    T5Module,
)
from lightning_megatron.models.memory_estimate import chunks_in_flight
from lightning_megatron.training.optimizers import LeanAdamW, Muon
from lightning_megatron.training.parameter_groups import ParameterGroups
from lightning_megatron.training.saved_bytes import SavedBytes
from tests.support.built import built

SIZES = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256, "seq_length": 32}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
GATED = {
    "num_query_groups": 2, "normalization": "RMSNorm", "activation": "swiglu", "bias": False,
    "position_embedding": "rope", "tie_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "gpt": GPTConfig(**SIZES),
    "gpt with dropout": GPTConfig(**SIZES, **DROPOUT),
    "llama": GPTConfig(**SIZES, **GATED),
    "llama with dropout": GPTConfig(**SIZES, **GATED, **DROPOUT),
    "olmo 2": GPTConfig(**SIZES, **GATED, norm_placement="output", joint_qk_norm=True, extra={"qk_layernorm": True}),
    "glm 4": GPTConfig(**SIZES, **GATED, norm_placement="sandwich"),
    "later tokens": GPTConfig(**SIZES, **GATED, mtp=2),
    "latent": GPTConfig(
        **SIZES,
        **{**GATED, "num_query_groups": None},
        latent_attention=LatentAttention(
            q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=40
        ),
    ),
    "latent lite": GPTConfig(
        **SIZES,
        **{**GATED, "num_query_groups": None},
        latent_attention=LatentAttention(kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
    ),
    "phi": GPTConfig(
        **SIZES,
        position_embedding="rope",
        parallel_residual=True,
        shared_norm=True,
        output_bias=True,
        tie_embeddings=False,
    ),  # fmt: skip
    "mixture": GPTConfig(**SIZES, **GATED, experts=Experts(num=6, top_k=3, ffn_hidden_size=40, z_weight=1e-3)),
    "mixture with another gate": GPTConfig(
        **{**SIZES, **GATED, "activation": "geglu"}, experts=Experts(num=4, top_k=2, balancing="none")
    ),
    "mixture in some layers": GPTConfig(
        **SIZES,
        bias=False,
        experts=Experts(num=8, top_k=2, shared_ffn_hidden_size=48, router="sigmoid", balancing="bias", layers=[0, 2]),
    ),
    "bert": BertConfig(**SIZES),
    "bert with dropout": BertConfig(**SIZES, **DROPOUT),
    "bert pre": BertConfig(**SIZES, norm_placement="pre"),
    "modern bert": BertConfig(
        **SIZES,
        norm_placement="embedding_pre",
        num_token_types=0,
        position_embedding="rope",
        sliding_window=5,
        sliding_window_layers=[1, 2],
        window_rotary_base=100.0,
        activation="geglu",
        bias=False,
        norm_bias=False,
    ),
    "t5": T5Config(**SIZES),
    "t5 with dropout": T5Config(**SIZES, **DROPOUT),
    "t5 gated": T5Config(**SIZES, activation="geglu_tanh", position_embedding="learned", tie_embeddings=False),
}
MODULES = {GPTConfig: GPTModule, BertConfig: BertModule, T5Config: T5Module}
ROWS, LENGTH = 2, 32
ONE = ParallelLayout(world_size=1)
UPDATED = [name for name in CONFIGS if name != "later tokens"]
PLAIN = Kernels(fused_layers=False, chunked_loss=False).on(torch.device("cpu"))


def measured(config, recompute, dtype, kernels, lora=None) -> tuple[int, int, int]:
    """Weights, those that are trained, and the most bytes that autograd kept in a step."""
    module = built(MODULES[type(config)](config, lora=lora), recompute=recompute, params_dtype=dtype, kernels=kernels)
    tokens = torch.randint(5, 256, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    counted = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 7 == 0  # as many as are masked
    labels = tokens.masked_fill(~counted, -100) if isinstance(config, BertConfig) else tokens
    inputs = module._fitted(module.get_batch({"input_ids": tokens, "labels": labels}))
    module._log_part = lambda *_: None  # no Trainer listens
    with SavedBytes(module.parameters()) as saved:
        weighted = {"labels": module._weighted_labels(inputs)} if module._sums_losses else {}
        loss = module.loss(module.active_model(**{**inputs, **weighted}), inputs)[0]
        if not kernels.fused_layers:  # whose backward passes refuse torch's hooks
            loss.backward()
    weights = list(module.parameters())
    return sum(p.numel() for p in weights), sum(p.numel() for p in weights if p.requires_grad), saved.peak


@pytest.mark.parametrize("recompute", [None, "selective", "full", 1], ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_to_one_and_activations_to_ten_percent(name, precision, recompute):
    assert_as_measured(CONFIGS[name], precision, recompute, PLAIN)


@pytest.mark.parametrize("recompute", [None, "selective", 1], ids=str)
@pytest.mark.parametrize("name", UPDATED)
def test_low_rank_updates(name, recompute):
    assert_as_measured(CONFIGS[name], "bf16-mixed", recompute, PLAIN, LoRA(rank=4))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"targets": ["q_proj", "v_proj"]}),
        ("llama", {"targets": ["gate_proj"], "dropout": 0.1}),
        ("llama", {"targets": r"model\.layers\.1\..*"}),
        ("gpt", {"targets": ["c_attn"], "dropout": 0.1}),
        ("gpt", {"also_train": ["embedding"]}),
        ("gpt", {"also_train": ["decoder.layers.0.mlp.linear_fc1", "decoder.final_layernorm"]}),
        ("llama", {"also_train": ["decoder.layers.1", "output_layer"]}),
        ("bert", {"targets": ["query", "value"]}),
        ("t5", {"targets": ["q", "v"]}),
    ],
    ids=str,
)  # fmt: skip
def test_some_low_rank_updates(name, settings):
    assert_as_measured(CONFIGS[name], "32-true", None, PLAIN, LoRA(rank=4, **settings))


def test_the_chunked_loss_of_a_frozen_output_layer_keeps_no_gradient_of_its_weight():
    kernels = replace(PLAIN, chunked_loss=True)
    assert_as_measured(replace(CONFIGS["gpt"], vocab_size=2048), "bf16-mixed", None, kernels, LoRA(rank=4))


@pytest.mark.parametrize(
    "name", ["gpt with dropout", "bert with dropout", "llama with dropout", "mixture in some layers"]
)
def test_a_list_of_modules(name):
    assert_as_measured(CONFIGS[name], "bf16-mixed", ["mlp"], PLAIN)


@pytest.mark.parametrize("name", ["gpt", "bert", "t5 gated"])
def test_a_loss_in_chunks(name):
    kernels = replace(PLAIN, chunked_loss=True)
    assert_as_measured(replace(CONFIGS[name], vocab_size=2048), "bf16-mixed", None, kernels)


def test_a_loss_in_chunks_has_the_logits_of_one_chunk():
    config = GPTConfig(**{**SIZES, "vocab_size": 128000, "seq_length": 6144})
    rows, weight = 6144 * 64, 64000 * 64
    layout = ParallelLayout(world_size=2, tp=2)
    chunk = 3072 * 64000 * 2  # two of at most 4096 tokens
    for fused, logits in ((True, chunk), (False, chunk * 5)):  # beside it in fp32, logits and their exponentials
        told = layout.memory(config, kernels=Kernels(fused_layers=fused)).largest
        assert (told.logits, told.buffers) == (rows * 2 + weight * 4, logits)
    apart = layout.memory(config, kernels=Kernels(fused_layers=True, fused_weight_gradients=False), lengths=(32,))
    assert apart.largest.buffers == weight * (4 + 2)  # the gradient times the loss's, in fp32 and bf16


@pytest.mark.parametrize(
    ("optimizer", "bytes_each"),
    [
        (torch.optim.SGD, 0), (partial(torch.optim.SGD, momentum=0.9), 4), (partial(LeanAdamW, on_host=True), 0),
        (partial(LeanAdamW, exp_avg_dtype="bfloat16"), 6), (ParameterGroups(torch.optim.AdamW), 8),
        (ParameterGroups(), 8), (torch.optim.Adam([torch.zeros(1)], amsgrad=True), 12), (Muon, 4),
    ],
    ids=str,
)  # fmt: skip
def test_the_modules_optimizer(optimizer, bytes_each):
    told = ONE.memory(CONFIGS["gpt"], precision="32-true", optimizer=optimizer).largest
    assert told.optimizer == told.weights / 4 * bytes_each


@pytest.mark.parametrize("recompute", [None, "selective"])
@pytest.mark.parametrize("name", ["gpt", "llama", "llama with dropout", "bert", "modern bert", "t5"])
def test_fused_layers(name, recompute):
    torch.compiler.set_stance("force_eager")  # the same functions, without waiting for their compilation
    try:
        assert_as_measured(CONFIGS[name], "bf16-mixed", recompute, replace(PLAIN, fused_layers=True))
    finally:
        torch.compiler.set_stance("default")


def assert_as_measured(config, precision, recompute, kernels, lora=None) -> None:
    size = {"32-true": 4, "bf16-mixed": 2}[precision]
    dtype = {4: torch.float32, 2: torch.bfloat16}[size]
    weights, trained, kept = measured(config, recompute, dtype, kernels, lora)
    settings = {"precision": precision, "recompute": recompute, "kernels": kernels, "device": "cpu", "lora": lora}
    told = ONE.memory(config, micro_batch_size=ROWS, **settings).largest
    assert told.weights == weights * size
    assert (told.gradients, told.optimizer) == (trained * 4, trained * (8 if size == 4 else 12))
    assert told.activations + told.logits == pytest.approx(kept, rel=0.1)


def test_states_by_precision():
    config = CONFIGS["gpt"]
    layout = ParallelLayout(world_size=4, tp=2)
    for precision, weight, gradient, optimizer in (
        ("32-true", 4, 4, 8),
        ("bf16-mixed", 2, 4, 12),
        ("16-mixed", 2, 4, 12),
        ("bf16-true", 2, 2, 12),
    ):
        told = layout.memory(config, precision=precision).largest
        numbers = told.weights / weight
        assert (told.gradients, told.optimizer) == (numbers * gradient, numbers * optimizer / 2)
        whole = layout.memory(config, precision=precision, distributed_optimizer=False).largest
        assert whole.optimizer == numbers * optimizer
    assert layout.memory(config, optimizer_states=0, precision="32-true").largest.optimizer == 0


def test_micro_batches_in_flight():
    """As megatron-core's schedules warm up; of few micro-batches no more than there are."""
    deep, interleaved = ParallelLayout(world_size=4, pp=4), ParallelLayout(world_size=4, pp=4, vp=2)
    assert [chunks_in_flight(deep, stage, None) for stage in range(4)] == [4, 3, 2, 1]
    assert [chunks_in_flight(deep, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    assert [chunks_in_flight(interleaved, stage, 8) for stage in range(4)] == [11, 9, 7, 5]
    assert chunks_in_flight(interleaved, 0, 4) == 8


def test_a_table_for_people():
    config = GPTConfig(
        num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, vocab_size=128256,
        seq_length=8192, **{**GATED, "num_query_groups": 8},
    )  # fmt: skip
    layout = ParallelLayout(world_size=64, tp=8, pp=4, vp=2, sequence_parallel=True)
    table = layout.memory(config, kernels=Kernels(chunked_loss=False))
    assert str(table).splitlines()[0].split() == ["GB", "stage", "0", "stage", "1", "stage", "2", "stage", "3"]
    assert [line.split()[0] for line in str(table).splitlines()[1:]] == [
        "weights", "gradients", "optimizer", "activations", "logits", "buffers", "total",
    ]  # fmt: skip
    assert sum(stage.weights for stage in table.stages) * 8 / 2 == pytest.approx(70.55e9, rel=0.01)  # a 70B model
    chunked = layout.memory(config, kernels=Kernels(chunked_loss=True))
    padded = layout.padded_vocab_size(128256)
    assert chunked.stages[3].logits == 8192 * 8192 * 2 + padded / 8 * 8192 * 4  # of hidden states and weight
    assert table.largest is table.stages[0]


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"precision": "fp8"}, "precision='fp8'): use '32-true'"),
        ({"micro_batch_size": 0}, "micro_batch_size=0): use a whole number"),
        ({"recompute": "all"}, "recompute='all'): use None or 'selective' or 'full'"),
        ({"device": "tpu"}, "device='tpu'): use 'cuda' or 'cpu'"),
        ({"lora": 8}, "lora=8): use lightning_megatron.LoRA(...)"),
    ],
    ids=str,
)
def test_refused(training, told):
    with pytest.raises(ValueError, match=r"^ParallelLayout\.memory\(") as error:
        ONE.memory(CONFIGS["gpt"], **training)
    assert told in str(error.value)
