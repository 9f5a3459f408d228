"""Arguments that are wrong in every world are refused where they are written, with name, value and what to use."""

import re
from datetime import timedelta
from typing import Any

import pytest
import torch
import yaml
from megatron.core.distributed import DistributedDataParallelConfig

from lightning_megatron import (
    BertConfig,
    Checkpointing,
    GPTConfig,
    GPTModule,
    LoRA,
    LRSchedule,
    MegatronPrecision,
    MegatronStrategy,
    ParameterGroups,
    T5Config,
    biases_and_vectors,
)
from lightning_megatron.callbacks import (
    ExitInterval,
    Perplexity,
    PipelineTimeline,
    Profile,
    Throughput,
    TrainingMonitor,
    TrainingProgressBar,
)
from lightning_megatron.cli.training import MegatronCLI
from lightning_megatron.data import (
    BatchSizeSteps,
    BertSamples,
    GPTSamples,
    MaskedLMCollator,
    RampUp,
    T5Samples,
    TextDataModule,
)

# Arguments of earlier versions, and the sentence's end.
FORMER: list[tuple[str, Any, str]] = [
    ("async_save", True, "checkpointing=Checkpointing(async_save=True)"),
    ("on_save_error", "warn", "checkpointing=Checkpointing(on_save_error='warn')"),
    ("verify_checkpoint", False, "checkpointing=Checkpointing(verify_checksums=False)"),
    ("trust_checkpoint", True, "checkpointing=Checkpointing(allow_pickle=True)"),
    ("optimizer_settings", "program", "checkpointing=Checkpointing(optimizer_settings='program')"),
    ("skip_batches", 3, "checkpointing=Checkpointing(skip_batches=3)"),
    ("check_loss", False, "on_nonfinite='ignore'"),
    ("check_loss", True, "on_nonfinite='raise'"),
    (
        "initial_loss_scale",
        256.0,
        "Trainer(plugins=MegatronPrecision('16-mixed', initial_loss_scale=256.0)) and no Trainer(precision=)",
    ),
    ("log_grad_norm", True, "Trainer(callbacks=lightning_megatron.callbacks.TrainingMonitor()), which logs it"),
    ("log_data_position", True, "Trainer(callbacks=lightning_megatron.callbacks.TrainingMonitor()), which logs it"),
]
STRATEGY: list[tuple[dict[str, Any], str]] = [
    ({"tp": 0}, "MegatronStrategy(tp=0): tp=0 is not a positive integer. Use tp=1 or more"),
    ({"tp": "two"}, "tp='two' is not a positive integer"),
    ({"tp": True}, "tp=True is not a positive integer"),
    ({"tp": 2.0}, "tp=2.0 is not a positive integer"),
    ({"tp": None}, "tp=None is not a positive integer"),
    ({"pp": -1}, "pp=-1 is not a positive integer"),
    ({"vp": 2}, "vp=2 interleaves pipeline stages, but pp=1. Use pp=2, or vp=None"),
    ({"vp": 0, "pp": 2}, "vp=0 is not a positive integer"),
    ({"vp": 1, "pp": 2}, "which is no interleaving. Use vp=None"),
    ({"cp_comm": "p2p", "cp": 2}, "use 'ring'"),
    ({"cp_comm": "ring"}, "with cp=1 none do"),
    ({"ep": 0}, "ep=0 is not a positive integer"),
    ({"etp": "1"}, "etp='1' is not a positive integer"),
    ({"sequence_parallel": 1}, "sequence_parallel=1 is not a bool"),
    ({"pipeline_split_rank": 1}, "both sides of an encoder-decoder model need one. Use pp=2 or more"),
    ({"pp": 2, "pipeline_split_rank": 2}, "Use pipeline_split_rank=1"),
    ({"pp": 4, "pipeline_split_rank": "1"}, "Use pipeline_split_rank=1 to 3"),
    ({"pp": 2, "layers_per_stage": [5, 2, 1]}, "has 3 stages, and pp=2 need 2 numbers. Use [4, 4] for instance."),
    ({"pp": 2, "layers_per_stage": "even"}, "use a list with the number of layers of each stage, 'auto'"),
    ({"micro_batch_size": 1, "num_microbatches": 2}, "give one; the other follows"),
    ({"micro_batch_size": 1.5}, "micro_batch_size=1.5): use a whole number from 1, or None."),
    ({"num_microbatches": False}, "num_microbatches=False): use a whole number from 1"),
    ({"num_microbatches": 3, "pp": 2, "vp": 2}, "num_microbatches=3 is not a multiple of pp=2"),
    ({"distributed_optimizer": "no"}, "distributed_optimizer='no'): use True or False."),
    ({"recompute": "ful"}, "recompute='ful'): use None or 'selective' or 'full', a number of layers"),
    ({"recompute": ["moe"]}, "'moe' is 'mlp' here, of layers with experts, too"),
    ({"kernels": {"fused_layers": True}}, "use lightning_megatron.Kernels(...)."),
    ({"ddp": {"overlap_grad_reduce": True}}, "use megatron.core.distributed.DistributedDataParallelConfig(...)"),
    ({"ddp": DistributedDataParallelConfig(overlap_param_gather=True)}, "only with overlap_grad_reduce=True"),
    ({"ddp": DistributedDataParallelConfig(average_in_collective=True)}, "divided once by the tokens"),
    (
        {"ddp": DistributedDataParallelConfig(use_distributed_optimizer=True), "distributed_optimizer": False},
        "contradict each other",
    ),
    (
        {"ddp": DistributedDataParallelConfig(num_distributed_optimizer_instances=2)},
        "does not build the groups that it needs",
    ),
    ({"on_nonfinite": "skp"}, "on_nonfinite='skp'): use 'raise' or 'skip' or 'ignore'."),
    ({"checkpointing": {"async_save": True}}, "use lightning_megatron.Checkpointing(...)."),
    ({"process_group_backend": "mpi"}, "process_group_backend='mpi'): use 'gloo', 'nccl'"),
    ({"timeout": 1800}, "timeout=1800): use a positive datetime.timedelta"),
    ({"timeout": timedelta(0)}, "use a positive datetime.timedelta"),
    ({"start_timeout": 600}, "start_timeout=600): use a positive datetime.timedelta"),
    ({"launch": "spawn"}, "launch='spawn'"),
    *(({former: value}, f"MegatronStrategy({former}={value!r}): use {use}.") for former, value, use in FORMER),
]


@pytest.mark.parametrize(("arguments", "says"), STRATEGY, ids=lambda value: str(value)[:60])
def test_the_strategys_constructor_refuses(arguments, says):
    with pytest.raises(Exception, match=re.escape(says)) as caught:
        MegatronStrategy(**arguments)
    assert str(caught.value).startswith("MegatronStrategy(")


def test_what_is_right_is_taken():
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    MegatronStrategy(tp=2, pp=2, vp=2, num_microbatches=4, ddp=ddp, on_nonfinite="skip")
    assert MegatronPrecision("16-mixed", 2**16).initial_loss_scale == MegatronPrecision("16-mixed").initial_loss_scale
    MegatronStrategy(pp=4, pipeline_split_rank=3, recompute="full", timeout=timedelta(seconds=5))
    MegatronStrategy(recompute=2)
    MegatronStrategy(recompute=["layernorm", "mlp_act", "core_attn", "mlp"])
    T5Config(**{**SIZES, "num_layers": None}, encoder_num_layers=2, decoder_num_layers=1)
    LoRA(targets="layers.*", also_train=["head"])
    LoRA(targets=("q_proj", "v_proj"))
    ParameterGroups(torch.optim.AdamW, no_weight_decay=biases_and_vectors, scale_lr=["*.bias"], lr_mult=0.5)


SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9, "seq_length": 4}
OTHERS: list[tuple[Any, dict[str, Any], str]] = [
    (MegatronPrecision, {"precision": "bf16"}, "does not train with precision='bf16'"),
    (
        MegatronPrecision,
        {"precision": "16-mixed", "initial_loss_scale": 0},
        "initial_loss_scale=0): use a number above 0",
    ),
    (
        MegatronPrecision,
        {"precision": "16-mixed", "initial_loss_scale": float("nan")},
        "use a number above 0, or None.",
    ),
    (
        MegatronPrecision,
        {"precision": "bf16-mixed", "initial_loss_scale": 8},
        "'transformer-engine-float16' scale the loss",
    ),
    (Checkpointing, {"skip_batches": -1}, "Checkpointing(skip_batches=-1): use a whole number from 0."),
    (Checkpointing, {"skip_batches": 2.5}, "skip_batches=2.5): use a whole number from 0."),
    (Checkpointing, {"async_save": "false"}, "async_save='false'): use True or False."),
    (Checkpointing, {"allow_pickle": 1}, "allow_pickle=1): use True or False."),
    (Checkpointing, {"verify_checksums": None}, "verify_checksums=None): use True or False."),
    (
        Checkpointing,
        {"optimizer_settings": "override"},
        "optimizer_settings='override'): use 'checkpoint' or 'program'.",
    ),
    (Checkpointing, {"on_save_error": "ignore"}, "on_save_error='ignore'): use 'raise' or 'warn'."),
    (GPTConfig, {**SIZES, "num_layers": 0}, "GPTConfig(num_layers=0): use a whole number from 1."),
    (GPTConfig, {**SIZES, "hidden_size": "8"}, "hidden_size='8'): use a whole number from 1."),
    (GPTConfig, {**SIZES, "num_attention_heads": None}, "num_attention_heads=None): use a whole number from 1."),
    (GPTConfig, {**SIZES, "activation": ["gelu"]}, "unknown activation ['gelu']"),
    (GPTConfig, {**SIZES, "extra": None}, "extra=None): use a dictionary"),
    (GPTConfig, {**SIZES, "shared_norm": True}, "shared_norm=True) needs parallel_residual=True"),
    (GPTConfig, {**SIZES, "joint_qk_norm": True}, "needs extra={'qk_layernorm': True} and normalization='RMSNorm'"),
    (GPTConfig, {**SIZES, "rotary_layers": [9]}, "rotary_layers=[9]): there is no layer 9"),
    (GPTConfig, {**SIZES, "norm_placement": "post"}, "unknown norm_placement 'post'"),
    (GPTConfig, {**SIZES, "rope_scaling": "linear"}, "rope_scaling='linear'): use a dictionary with rope_type"),
    (GPTConfig, {**SIZES, "sliding_window": True}, "sliding_window=True"),
    (BertConfig, {**SIZES, "num_layers": None}, "BertConfig(num_layers=None): use a whole number"),
    (T5Config, {**SIZES, "num_layers": None}, "T5Config(num_layers=None): use a whole number"),
    (T5Config, {**SIZES, "vocab_size": "9"}, "T5Config(vocab_size='9'): use a whole number"),
    (LRSchedule, {"warmup_steps": None}, "LRSchedule: warmup_steps=None is not a whole number"),
    (LoRA, {"targets": [1]}, "LoRA(targets=[1]): use a list of names."),
    (LoRA, {"also_train": "head"}, "LoRA(also_train='head'): use a list of names."),
    (ParameterGroups, {"optimizer": "adamw"}, "ParameterGroups(optimizer='adamw'): use a function that makes"),
    (ParameterGroups, {"no_weight_decay": "*.bias"}, "no_weight_decay='*.bias'): use a list of names, or None."),
    (RampUp, {"start": "8", "increment": 8, "samples": 64}, "RampUp(start='8') must be at least 1, and a whole"),
    (BatchSizeSteps, {"sizes": {0: 8, 8.5: 16}}, "BatchSizeSteps(sizes={0: 8, 8.5: 16})"),
    (GPTSamples, {"seq_length": 8.5}, "GPTSamples(seq_length=8.5): use a whole number"),
    (GPTSamples, {"seq_length": 8, "eod_mask_loss": "no"}, "eod_mask_loss='no'): use True or False."),
    (BertSamples, {"seq_length": "64"}, "BertSamples(seq_length='64'): use a whole number"),
    (T5Samples, {"seq_length": 64, "masking_probability": "0.1"}, "masking_probability='0.1'): use a number."),
    (MaskedLMCollator, {"vocab_size": 9, "mask_id": 1.5}, "MaskedLMCollator(mask_id=1.5): use a whole number."),
    (ExitInterval, {"steps": 2.5}, "ExitInterval(steps=2.5): use a whole number from 1."),
    (Perplexity, {"loss": None}, "Perplexity(loss=None): use the name of a logged metric."),
    (TrainingProgressBar, {"refresh_rate": "1"}, "TrainingProgressBar(refresh_rate='1'): use a whole number from 0."),
    (GPTConfig, {**SIZES, "ffn_hidden_size": 0}, "GPTConfig(ffn_hidden_size=0): use a whole number from 1, or None."),
    (GPTConfig, {**SIZES, "kv_channels": 2.5}, "kv_channels=2.5): use a whole number"),
    (GPTConfig, {**SIZES, "num_query_groups": 0}, "num_query_groups=0): use a whole number"),
    (GPTConfig, {**SIZES, "layernorm_epsilon": -1e-5}, "layernorm_epsilon=-1e-05): use a number from 0."),
    (GPTConfig, {**SIZES, "init_method_std": "small"}, "init_method_std='small'): use a number from 0."),
    (GPTConfig, {**SIZES, "make_vocab_size_divisible_by": 0}, "make_vocab_size_divisible_by=0): use a whole number"),
    (GPTConfig, {**SIZES, "hidden_dropout": "0.1"}, "hidden_dropout=0.1): use a probability"),
    (GPTConfig, {**SIZES, "rotary_percent": 25}, "rotary_percent=25): use a number above 0 up to 1."),
    (GPTConfig, {**SIZES, "rotary_base": 0}, "rotary_base=0): use a number above 0."),
    (GPTConfig, {**SIZES, "bias": "false"}, "bias='false'): use True or False."),
    (GPTConfig, {**SIZES, "sliding_window": "4"}, "sliding_window='4'"),
    (BertConfig, {**SIZES, "seq_length": 0}, "BertConfig(seq_length=0): use a whole number"),
    (BertConfig, {**SIZES, "num_labels": "3"}, "num_labels='3'): use a whole number from 1."),
    (T5Config, {**SIZES, "decoder_num_layers": "2"}, "decoder_num_layers='2'): use a whole number from 1, or None."),
    (T5Config, {**SIZES, "decoder_start_id": 1.5}, "decoder_start_id=1.5): use a whole number from 0."),
    (LRSchedule, {"min_lr": "1e-4x"}, "LRSchedule(min_lr='1e-4x'): use a number."),
    (LRSchedule, {"min_lr": float("nan")}, "LRSchedule(min_lr=nan): use a number."),
    (LRSchedule, {"warmup_fraction": "0.1"}, "warmup_fraction='0.1'): use a number, or None."),
    (LoRA, {"rank": 2.5}, "LoRA(rank=2.5): use a whole number from 1."),
    (LoRA, {"alpha": float("inf")}, "LoRA(alpha=inf): use a number."),
    (LoRA, {"rslora": "yes"}, "LoRA(rslora='yes'): use True or False."),
    (TextDataModule, {"batch_size": "8"}, "TextDataModule(batch_size='8'): use a whole number."),
    (TextDataModule, {"num_workers": -1}, "TextDataModule(num_workers=-1): use a whole number from 0."),
    (TextDataModule, {"shuffle": "no"}, "TextDataModule(shuffle='no'): use True or False."),
    (Throughput, {"window": 0.5}, "Throughput(window=0.5): use a whole number."),
    (TrainingMonitor, {"zeros": 3}, "TrainingMonitor(zeros=3): use True or False."),
    (TrainingMonitor, {"expert_pictures": [2, 0]}, "TrainingMonitor(expert_pictures=0): use a whole number from 1."),
    (Profile, {"first": "2"}, "Profile(first='2'): use a whole number."),
    (PipelineTimeline, {"steps": [1, 2.5]}, "PipelineTimeline(steps=2.5): use a whole number."),
]


@pytest.mark.parametrize(("make", "arguments", "says"), OTHERS, ids=lambda value: str(value)[-50:])
def test_other_constructors_refuse(make, arguments, says):
    with pytest.raises(Exception, match=re.escape(says)):
        make(**arguments)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--trainer.strategy.tp=0", "error: MegatronStrategy(tp=0): tp=0 is not a positive integer. Use tp=1 or more."),
        ("--trainer.strategy.vp=2", "error: MegatronStrategy(vp=2): vp=2 interleaves pipeline stages, but pp=1."),
        (
            "--trainer.strategy.checkpointing.skip_batches=-1",
            "Checkpointing(skip_batches=-1): use a whole number from 0.",
        ),
        (
            "--trainer.strategy.checkpointing.async_save=3",
            "--trainer.strategy.checkpointing.async_save=3: use true or false",
        ),
        ("--trainer.strategy.checkpointing.asyncs=true", "did you mean --trainer.strategy.checkpointing.async_save?"),
        *(
            (f"--trainer.strategy.{name}={value}", f"error: MegatronStrategy({name}={value!r}): use {use}.")
            for name, value, use in FORMER
        ),
        ("--trainer.strategy.timeout=0:0:0", "use a positive datetime.timedelta"),
        ("--model.config.ffn_hidden_size=0", "GPTConfig(ffn_hidden_size=0): use a whole number from 1, or None."),
        ("--data.num_workers=-1", "TextDataModule(num_workers=-1): use a whole number from 0."),
    ],
)
def test_the_command_line_says_it_in_one_line(option, says, capsys):
    with pytest.raises(SystemExit) as caught:
        _command_line(option)
    told = [line for line in f"{caught.value.code}\n{capsys.readouterr().err}".splitlines() if says in line]
    assert len(told) == 1, (caught.value.code, torch.__version__)


def _command_line(*options: str) -> MegatronCLI:
    sizes = [f"--model.config.{name}={value}" for name, value in SIZES.items()]
    return MegatronCLI(GPTModule, TextDataModule, args=[*sizes, "--trainer.accelerator=cpu", *options], run=False)


def test_a_file_is_told_of_former_arguments_and_takes_those_of_today(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    for name, value, use in FORMER:
        strategy = {"class_path": "lightning_megatron.MegatronStrategy", "init_args": {"tp": 1, name: value}}
        file.write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
        with pytest.raises(SystemExit):
            _command_line(f"--config={file}")
        assert f"error: MegatronStrategy({name}={value!r}): use {use}.\n" in capsys.readouterr().err
    strategy["init_args"] = {"checkpointing": {"async_save": True, "skip_batches": 4}}
    file.write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    run = _command_line(f"--config={file}", "--trainer.strategy.checkpointing.skip_batches=5")
    asked = run.config.trainer.strategy.init_args.checkpointing
    assert Checkpointing(**asked) == Checkpointing(async_save=True, skip_batches=5)
    assert run.trainer.strategy.checkpointer.asynchronous
    file.write_text("trainer: {strategy: megatron}")
    assert isinstance(_command_line(f"--config={file}").trainer.strategy, MegatronStrategy)
    with pytest.raises(SystemExit):
        _command_line(f"--config={file}", "--trainer.strategy.tp=1")
    assert "strategy=megatron takes no arguments of its own; name the class instead:" in capsys.readouterr().err
