"""An argument that does not exist, or that may not stand by its place, is answered with what to write instead."""

import copy
import dataclasses
import importlib
import inspect
import pickle
import sys
from typing import Any

import pytest

import lightning_megatron
from lightning_megatron import (
    BertConfig,
    Checkpointing,
    Experts,
    GPTConfig,
    GPTModule,
    Kernels,
    LatentAttention,
    LeanAdamW,
    LoRA,
    LRSchedule,
    MegatronPrecision,
    MegatronStrategy,
    Muon,
    ParallelLayout,
    ParameterGroups,
    T5Config,
)
from lightning_megatron.callbacks import Profile, Throughput
from lightning_megatron.cli.migrate.settings_table import DESTINATIONS
from lightning_megatron.data import GPTSamples, HFDataModule, MaskedLMCollator, MegatronDataModule, TextDataModule
from lightning_megatron.distributed import other_names
from lightning_megatron.distributed.wrong_names import elsewhere, meant, unknown_name

# A class, a wrong argument, and what the error says to write.
WRONG: list[tuple[type, str, str]] = [
    # Megatron-LM and NeMo
    (MegatronStrategy, "tensor_model_parallel_size", "use tp."),
    (MegatronStrategy, "pipeline_model_parallel_size", "use pp."),
    (MegatronStrategy, "virtual_pipeline_model_parallel_size", "use vp."),
    (MegatronStrategy, "use_distributed_optimizer", "use distributed_optimizer."),
    (MegatronStrategy, "recompute_granularity", "use recompute."),
    (MegatronStrategy, "overlap_grad_reduce", "use ddp."),
    (MegatronStrategy, "pipeline_dtype", "it is Trainer(precision=)."),
    (MegatronStrategy, "moe_grouped_gemm", "it is GPTConfig(experts=Experts(num=8, top_k=2))"),
    (MegatronStrategy, "disable_tp_comm_overlap_ag", "not here: "),
    (MegatronStrategy, "expert_model_parallel_size", "use ep."),
    (MegatronStrategy, "expert_tensor_parallel_size", "use etp."),
    (MegatronStrategy, "moe_ffn_hidden_size", "it is Experts(ffn_hidden_size=)."),
    (MegatronStrategy, "moe_token_dispatcher_type", "it is Kernels(expert_dispatch=)."),
    (GPTConfig, "num_moe_experts", "it is GPTConfig(experts=Experts(num=8, top_k=2))"),
    (GPTConfig, "router_aux_loss_coef", "it is Experts(aux_weight=)."),
    (Experts, "num_experts_per_tok", "use top_k."),
    (GPTConfig, "multi_latent_attention", "use latent_attention."),
    (GPTConfig, "kv_lora_rank", "it is LatentAttention(kv_lora_rank=)."),
    (LatentAttention, "qk_pos_emb_head_dim", "use qk_rope_head_dim."),
    (Experts, "n_routed_experts", "use num."),
    (Experts, "moe_aux_loss_coeff", "use aux_weight."),
    (Experts, "norm_topk_prob", "use normalize_top_k."),
    (Experts, "capacty_factor", "did you mean capacity_factor?"),
    (GPTConfig, "num_query_group", "did you mean num_query_groups?"),
    (GPTConfig, "swiglu", "use activation='swiglu'."),
    (GPTConfig, "untie_embeddings_and_output_weights", "use tie_embeddings=False."),
    (GPTConfig, "qk_layernorm", "it is a field of megatron-core's, extra={'qk_layernorm': ...}."),
    (LRSchedule, "lr_warmup_iters", "use warmup_steps."),
    (LRSchedule, "lr_decay_style", "use style."),
    (MegatronDataModule, "data_path", "use paths."),
    (MegatronDataModule, "rampup_batch_size", "use ramp_up."),
    (ParameterGroups, "no_wd_decay_cond", "use no_weight_decay."),
    # accelerate and DeepSpeed
    (MegatronStrategy, "tp_degree", "use tp."),
    (MegatronStrategy, "num_micro_batches", "use num_microbatches."),
    (MegatronStrategy, "sequence_parallelism", "use sequence_parallel."),
    (MegatronStrategy, "zero_stage", "use distributed_optimizer=True."),
    (MegatronStrategy, "train_micro_batch_size_per_gpu", "use micro_batch_size."),
    (MegatronStrategy, "gradient_clipping", "it is Trainer(gradient_clip_val=)."),
    # transformers
    (MegatronStrategy, "gradient_checkpointing", "use recompute='full'."),
    (MegatronStrategy, "bf16", "it is Trainer(precision='bf16-mixed')."),
    (GPTConfig, "n_layers", "use num_layers."),
    (GPTConfig, "n_embd", "use hidden_size."),
    (GPTConfig, "num_hidden_layers", "use num_layers."),
    (GPTConfig, "intermediate_size", "use ffn_hidden_size."),
    (GPTConfig, "num_key_value_heads", "use num_query_groups."),
    (GPTConfig, "rms_norm_eps", "use layernorm_epsilon."),
    (GPTConfig, "rope_theta", "use rotary_base."),
    (GPTConfig, "torch_dtype", "it is Trainer(precision=)."),
    (BertConfig, "num_classes", "use num_labels."),
    (T5Config, "d_model", "use hidden_size."),
    (T5Config, "d_kv", "use kv_channels."),
    (GPTModule, "attn_implementation", "it is Kernels(attention=)."),
    (GPTModule, "device_map", "MegatronStrategy(tp=, pp=) says which rank holds which weights."),
    (GPTModule, "load_in_8bit", "quantised weights are not here; "),
    (LRSchedule, "num_warmup_steps", "use warmup_steps."),
    (LRSchedule, "num_training_steps", "use decay_steps."),
    (MaskedLMCollator, "mlm_probability", "use probability."),
    (HFDataModule, "max_length", "use seq_length."),
    (HFDataModule, "dataset_text_field", "use text_column."),
    (HFDataModule, "per_device_train_batch_size", "use batch_size."),
    # peft
    (LoRA, "r", "use rank."),
    (LoRA, "lora_alpha", "use alpha."),
    (LoRA, "target_modules", "use targets."),
    (LoRA, "modules_to_save", "use also_train."),
    (LoRA, "bias", "biases stay frozen"),
    # torch
    (LRSchedule, "eta_min", "use min_lr."),
    (LeanAdamW, "learning_rate", "use lr."),
    (Muon, "beta1", "use betas."),
    (Kernels, "flash_attn", "use attention='flash'."),
    (Kernels, "torch_compile", "use fused_layers=True."),
    # of another class here
    (GPTConfig, "tp", "it is MegatronStrategy(tp=)."),
    (MegatronStrategy, "hidden_size", "it is GPTConfig(hidden_size=)."),
    (MegatronStrategy, "devices", "it is Trainer(devices=)."),
    (MegatronStrategy, "dp", "it is what is left of the ranks, "),
    (MegatronStrategy, "attention", "it is Kernels(attention=)."),
    (TextDataModule, "lr", "it is the optimizer's, "),
    # typing errors
    (MegatronStrategy, "tpp", "did you mean tp?"),
    (MegatronStrategy, "microbatchsize", "did you mean micro_batch_size?"),
    (GPTConfig, "hiden_size", "did you mean hidden_size?"),
    (Kernels, "chunk_loss", "did you mean chunked_loss?"),
    (Checkpointing, "asyncsave", "did you mean async_save?"),
    (ParallelLayout, "worldsize", "did you mean world_size?"),
    (ParallelLayout, "tensor_parallel", "use tp."),
    (Profile, "fist", "did you mean first?"),
    (GPTSamples, "sequence_length", "use seq_length."),
    (MegatronPrecision, "loss_scale", "use initial_loss_scale."),
    # like nothing
    (LoRA, "colour", "it takes alpha, also_train, dropout, rank, rslora, targets."),
    (Throughput, "colour", "it takes peak_tflops, window."),
]


@pytest.mark.parametrize(("cls", "name", "says"), WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_argument_is_answered(cls, name, says):
    with pytest.raises(TypeError) as raised:
        cls(**{name: 1})
    assert str(raised.value).startswith(f"{cls.__name__} has no argument {name!r}: {says}")


def test_all_wrong_arguments_are_in_one_error():
    with pytest.raises(TypeError) as raised:
        GPTConfig(n_layer=2, n_embd=64, n_head=4)
    assert str(raised.value).splitlines() == [
        "GPTConfig has no argument 'n_layer': use num_layers.",
        "GPTConfig has no argument 'n_embd': use hidden_size.",
        "GPTConfig has no argument 'n_head': use num_attention_heads.",
    ]


def test_the_sizes_of_an_estimate_are_answered():
    layout = ParallelLayout(world_size=1)
    config = GPTConfig(num_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=32, seq_length=8)
    with pytest.raises(TypeError, match=r"ParallelLayout.memory has no argument 'microbatch_size': use micro_batch_s"):
        layout.memory(config, microbatch_size=2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: MegatronStrategy(4), r"takes its arguments by name, such as MegatronStrategy\(tp=4\)\. It has tp, "),
        (lambda: MegatronStrategy(2, 4), r"such as MegatronStrategy\(tp=2, pp=4\)\."),
        (lambda: GPTConfig(2, 64, 4), r"such as GPTConfig\(num_layers=2, hidden_size=64, num_attention_heads=4\)\."),
        (lambda: LoRA(16), r"such as LoRA\(rank=16\)\."),
        (lambda: ParallelLayout(8, 2), r"such as ParallelLayout\(world_size=8, tp=2\)\."),
        (lambda: LRSchedule("cosine", 100), r"such as LRSchedule\(warmup_steps=100\)\."),
        (lambda: Kernels("flash"), r"such as Kernels\(fused_layers='flash'\)\. It has .*attention"),
        (lambda: Throughput(1, 2.0, 3), r"takes 2 arguments, window, peak_tflops; 3 were given\. Leave the"),
    ],
)  # fmt: skip
def test_arguments_by_their_place_are_answered(call, says):
    with pytest.raises(TypeError, match=says):
        call()


# Every class in public


def public_classes() -> list[type]:
    rooms = [lightning_megatron, *(importlib.import_module(f"lightning_megatron.{n}") for n in ("callbacks", "data"))]
    named = {getattr(room, name) for room in rooms for name in room.__all__}
    kept = {each for each in named if inspect.isclass(each) and not issubclass(each, Exception)}
    return sorted(kept, key=lambda each: each.__name__)


# from_pretrained, bases of users' classes, and a layer that takes what megatron-core gives to others
NOT_MADE_BY_CALLS = {"AutoModule", "MegatronModule", "ModelChunk", "ExpertLayer"}


@pytest.mark.parametrize("cls", public_classes(), ids=lambda cls: cls.__name__)
def test_every_public_class_answers(cls):
    if inspect.isabstract(cls) or cls.__name__ in NOT_MADE_BY_CALLS:
        pytest.skip("nobody makes one")
    with pytest.raises(TypeError, match=f"{cls.__name__}( has no argument 'zzz': it takes |.. takes no arguments)"):
        cls(zzz=1)


@pytest.mark.parametrize("cls", public_classes(), ids=lambda cls: cls.__name__)
def test_signatures_stay(cls):
    parameters = inspect.signature(cls).parameters.values()
    assert not {"args", "kwargs"} & {each.name for each in parameters} or cls.__name__ in NOT_MADE_BY_CALLS


@pytest.mark.parametrize("made", [LoRA(rank=4), Kernels(chunked_loss=True), LRSchedule("cosine", warmup_steps=3)])
def test_dataclasses_stay_dataclasses(made):
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == dataclasses.replace(made) == made
    assert repr(made).startswith(f"{type(made).__name__}(")


# The tables


def test_the_tables_name_arguments_that_there_are():
    classes = {cls.__name__: inspect.signature(cls).parameters for cls in public_classes()}
    for names, table in other_names.OTHERS.items():
        known = {name for cls in names.split() for name in classes.get(cls, ())}
        assert set(table) <= known, names


MEGATRON_LM = {
    name: found.place.rpartition(".")[2]
    for name, found in DESTINATIONS.items()
    if found.place and found.place.startswith("trainer.strategy.init_args.") and found.place.count(".") == 3
}


@pytest.mark.parametrize("name", MEGATRON_LM)
def test_settings_of_megatron_lm_are_told_as_migrate_places_them(name):
    known = inspect.signature(MegatronStrategy).parameters
    if name not in known:
        assert (meant(name, known, "MegatronStrategy") or "").partition("=")[0] == MEGATRON_LM[name]


def test_what_is_neither_is_looked_up_in_the_table_of_migrate():
    assert elsewhere("overlap_p2p_communication_warmup_flush", "MegatronStrategy") == (
        "Megatron-LM's setting is config.extra['overlap_p2p_comm_warmup_flush'] here"
    )


def test_options_with_dashes_are_names_too():
    assert meant("--tensor-model-parallel-size", ["tp", "pp"]) == "tp"
    assert unknown_name("gpus", ["devices", "max_steps"], "Trainer") == "Trainer has no argument 'gpus': use devices."


def test_the_answers_import_nothing_heavy():
    module: Any = sys.modules["lightning_megatron.distributed.wrong_names"]
    imported = {value.__name__ for value in vars(module).values() if inspect.ismodule(value)}
    assert imported == {"lightning_megatron.distributed.other_names"}
