"""Settings of accelerate and Megatron-LM become runs that the command reads, and that do what those tools document."""

import csv
import dataclasses
import itertools
import math
import random
import sys

import pytest
import torch
import transformers
import yaml
from accelerate.utils import MegatronLMPlugin
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from lightning_megatron import (
    BertConfig,
    Experts,
    GPTConfig,
    LeanAdamW,
    LRSchedule,
    ParallelLayout,
    T5Config,
    biases_and_vectors,
)
from lightning_megatron.cli.migrate import MigrationError, from_accelerate, from_command_line, from_plugin
from lightning_megatron.cli.migrate.accelerate import MEGATRON, PARAMETERS
from lightning_megatron.cli.migrate.settings_table import _PLACED, DESTINATIONS, SCHEDULE, _elsewhere
from lightning_megatron.cli.training import MegatronCLI
from lightning_megatron.data import RampUp
from tests.support.pages import ROOT, blocks, script, shell


@pytest.fixture(scope="module")
def parser():
    """The command's own parser of runs."""
    made = {}

    class Unparsed(MegatronCLI):
        def parse_arguments(self, parser, args):
            made["parser"] = parser
            raise KeyboardInterrupt

    argv, sys.argv = sys.argv, ["migration"]
    with pytest.raises(KeyboardInterrupt):
        Unparsed(run=False, args=[])
    sys.argv = argv
    return made["parser"]


def parsed(parser, plan) -> Namespace:
    return parser.parse_string(plan.yaml())


# Accelerate's configurations: what each key can be

KEYS = {
    "tp_degree": [1, 2, "4"],
    "pp_degree": [1, 2, 4],
    "num_micro_batches": [1, 4, "8"],
    "gradient_clipping": [0, 0.5, "1.0"],
    "sequence_parallelism": [True, False, "true"],
    "recompute_activations": [True, False],
    "recompute_granularity": ["full", "selective"],
    "recompute_method": ["uniform", "block"],
    "recompute_num_layers": [1, 2],
    "use_distributed_optimizer": [True, False, "False"],
    "context_parallel_size": [1, 2],
    "expert_model_parallel_size": [1, 2],
    "expert_tensor_parallel_size": [1, 2],
    "decoder_last_pipeline_num_layers": [1, 3],
    "attention_dropout": [0.0, 0.1],
    "hidden_dropout": [0.0, "0.2"],
    "attention_softmax_in_fp32": [True, False],
    "attention_backend": [True, False],
    "use_rotary_position_embeddings": [True, False],
    "calculate_per_token_loss": [True, False],
    "eod_mask_loss": [True, False],
    "use_custom_fsdp": [True, False],
    "optimizer_cpu_offload": [True, False],
    "overlap_cpu_optimizer_d2h_h2d": [True, False],
    "use_precision_aware_optimizer": [True, False],
    "no_load_optim": [True, False],
    "no_save_optim": [True, False],
}
TOP = {
    "mixed_precision": ["no", "fp16", "bf16", False],
    "num_machines": [1, 2],
    "use_cpu": [True, False],
    "machine_rank": [0, 1],
    "main_process_ip": ["10.0.0.1", None],
    "main_process_port": [29501, None],
    "gradient_accumulation_steps": [1, 4],
    "deepspeed_config": [{}],
    "fsdp_config": [{}],
    "downcast_bf16": ["no"],
    "rdzv_backend": ["static"],
    "same_network": [True],
    "main_training_function": ["main"],
    "compute_environment": ["LOCAL_MACHINE"],
}


def generated(number: int) -> dict:
    """A configuration; over 60 of them every value of every key occurs."""
    draw = random.Random(number)
    keys = sorted(KEYS)
    chosen = {key for key in keys if draw.random() < 0.5} | set(keys[number % len(keys) :][:3])
    block = {f"megatron_lm_{key}": draw.choice(KEYS[key]) for key in sorted(chosen)}
    top = {key: draw.choice(values) for key, values in TOP.items() if draw.random() < 0.7}
    world = 32 * int(top.get("num_machines", 1))
    return {"distributed_type": "MEGATRON_LM", "num_processes": world, **top, "megatron_lm_config": block}


NUMBERS = range(60)


def test_every_value_of_every_key_is_generated():
    seen = {(key, str(value)) for number in NUMBERS for key, value in generated(number)["megatron_lm_config"].items()}
    assert seen == {(f"megatron_lm_{key}", str(value)) for key, values in KEYS.items() for value in values}
    tops = {(key, str(value)) for number in NUMBERS for key, value in generated(number).items() if key in TOP}
    assert tops == {(key, str(value)) for key, values in TOP.items() for value in values}


def _true(value) -> bool:
    return str(value).lower() == "true"


@pytest.mark.parametrize("number", NUMBERS)
def test_an_accelerate_configuration(number, parser):
    config = generated(number)
    block = {key.removeprefix("megatron_lm_"): value for key, value in config["megatron_lm_config"].items()}
    plan = from_accelerate(config)
    run = parsed(parser, plan)
    trainer, strategy = run.trainer, run.trainer.strategy.init_args

    sizes = {
        "tp": block.get("tp_degree", 1),
        "pp": block.get("pp_degree", 1),
        "cp": block.get("context_parallel_size", 1),
    }
    sizes |= {"ep": block.get("expert_model_parallel_size", 1), "etp": block.get("expert_tensor_parallel_size")}
    for name, size in sizes.items():
        assert strategy[name] == (None if size is None else int(size)), name
    read = {name: None if size is None else int(size) for name, size in sizes.items()}
    layout = ParallelLayout(world_size=config["num_processes"], **read)
    assert trainer.devices * trainer.num_nodes == layout.world_size
    assert trainer.num_nodes == config.get("num_machines", 1)
    assert trainer.accelerator == ("cpu" if config.get("use_cpu") else "gpu")
    precision = {"no": "32-true", "False": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    assert trainer.precision == precision[str(config.get("mixed_precision", "no"))]
    # accelerate clips at 1.0 where nothing is said, and 0 is no clipping.
    assert (trainer.gradient_clip_val or 0) == float(block.get("gradient_clipping", 1.0))
    assert strategy.num_microbatches == (int(block["num_micro_batches"]) if "num_micro_batches" in block else None)
    assert strategy.sequence_parallel == _true(block.get("sequence_parallelism", False))
    assert strategy.distributed_optimizer == _true(block.get("use_distributed_optimizer", True))
    selective = "selective" if block.get("recompute_activations") else None
    granularity, layers = block.get("recompute_granularity", selective), block.get("recompute_num_layers")
    some = granularity == "full" and block.get("recompute_method") == "block" and layers
    assert strategy.recompute == (some or granularity)
    model = run.model.init_args
    given = model.get("config") or {}
    for name in ("hidden_dropout", "attention_dropout"):
        assert given.get(name) == (float(block[name]) if name in block else None)
    if block.get("use_rotary_position_embeddings"):
        assert given["position_embedding"] == "rope"
    assert model.loss_reduction == ("token" if block.get("calculate_per_token_loss", True) else "micro_batch")
    extra = given.get("extra", {})
    last = block.get("decoder_last_pipeline_num_layers") if strategy["pp"] > 1 else None
    assert extra.get("num_layers_in_last_pipeline_stage") == last
    assert extra.get("attention_softmax_in_fp32") == block.get("attention_softmax_in_fp32")
    if granularity == "full" and not some and (layers or 1) > 1:
        assert (extra["recompute_method"], extra["recompute_num_layers"]) == ("uniform", layers)
    GPTConfig(num_layers=8, hidden_size=64, num_attention_heads=4, extra=extra)  # it knows each of them

    said = {line.setting for line in plan.lines}
    assert said >= block.keys() - ({"recompute_activations"} if "recompute_granularity" in block else set())
    assert said >= config.keys() & TOP.keys() - {"machine_rank", "main_process_ip", "main_process_port"}
    missing = {line.setting for line in plan.missing}
    assert "use_custom_fsdp" in missing or not block.get("use_custom_fsdp")
    assert not any("expert" in name for name in missing)


def test_the_environment_stands_behind_the_configuration():
    variables = {"MEGATRON_LM_TP_DEGREE": "4", "MEGATRON_LM_PP_DEGREE": "2", "ACCELERATE_MIXED_PRECISION": "bf16"}
    config = {"distributed_type": "MEGATRON_LM", "num_processes": 8, "megatron_lm_config": {"megatron_lm_pp_degree": 1}}
    plan = from_accelerate(config, environment=variables)
    assert plan.run["trainer"]["strategy"]["init_args"] == {"tp": 4, "pp": 1}
    assert plan.run["trainer"]["precision"] == "bf16-mixed"


# The plugin itself


def test_every_parameter_of_the_plugin_is_known():
    assert PARAMETERS.keys() == {field.name for field in dataclasses.fields(MegatronLMPlugin)}
    assert set(MEGATRON.values()) <= DESTINATIONS.keys()


def test_what_the_plugin_fills_in_by_itself_is_not_carried_over():
    run = from_plugin(MegatronLMPlugin(tp_degree=2, pp_degree=2, num_micro_batches=4), world_size=4).run
    assert run["trainer"]["strategy"]["init_args"] == {"tp": 2, "pp": 2, "num_microbatches": 4}
    assert run["trainer"]["gradient_clip_val"] == 1.0
    assert "config" not in run["model"]["init_args"]  # neither rotary positions nor dropout


def test_every_argument_has_its_line():
    def decays(name, parameter):
        return name.endswith("bias")

    values = {
        "num_layers_per_virtual_pipeline_stage": 2,
        "decoder_last_pipeline_num_layers": 2,
        "train_samples": None,
        "lr_decay_samples": None,
        "lr_warmup_samples": None,
        "lr_warmup_fraction": None,
        "other_megatron_args": {"num_layers": 8, "qk_layernorm": True, "reset_position_ids": True, "eos_token_id": 3},
        "no_wd_decay_cond": decays,
        "lr_decay_style": "cosine",
        "weight_decay_incr_style": "linear",
        "start_weight_decay": 0.0,
        "end_weight_decay": 0.1,
        "pp_degree": 2,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
    }
    flags = {name for name, megatrons in MEGATRON.items() if DESTINATIONS[megatrons].flag}
    asked = {name: values.get(name, True if name in flags else 1) for name in PARAMETERS}
    plan = from_plugin({name: value for name, value in asked.items() if value is not None})
    said = {line.setting for line in plan.lines}
    assert said >= {name for name, value in asked.items() if value is not None} - {"recompute_activations"}
    model = plan.run["model"]["init_args"]
    assert model["config"]["extra"]["qk_layernorm"] is True
    assert plan.run["model"]["dict_kwargs"] == {"reset_position_ids": True, "eod_mask_loss": True, "eod_id": 3}
    assert plan.run["trainer"]["strategy"]["init_args"]["vp"] == 2


GLOBAL_BATCH = 12
STYLES = ["constant", "linear", "cosine", "inverse-square-root"]
DECAYS = [
    {},
    {"weight_decay_incr_style": "linear", "start_weight_decay": 0.01, "end_weight_decay": 0.2},
    {"weight_decay_incr_style": "cosine", "start_weight_decay": 0.0, "end_weight_decay": 0.1},
    {"weight_decay_incr_style": "constant", "start_weight_decay": 0.05, "end_weight_decay": 0.05},
]
LENGTHS = [
    {"train_iters": 80},
    {"train_iters": 100, "lr_warmup_iters": 10},
    {"train_iters": 100, "lr_decay_iters": 60, "lr_warmup_iters": 5, "min_lr": 1e-5},
    {"train_iters": 90, "lr_decay_iters": 70, "lr_warmup_fraction": 0.1, "min_lr": 1e-4},
]


def _optimizer():
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=3e-3, weight_decay=0.1)


def _accelerates(asked: dict, optimizer) -> OptimizerParamScheduler:
    """What accelerate's ``prepare`` builds, which counts samples of the global batch."""
    horizon = asked["train_iters"] * GLOBAL_BATCH
    decay = asked.get("lr_decay_iters", asked["train_iters"]) * GLOBAL_BATCH
    warmup = asked.get("lr_warmup_iters", 0) * GLOBAL_BATCH
    if "lr_warmup_fraction" in asked:
        warmup = asked["lr_warmup_fraction"] * decay
    for group in optimizer.param_groups:
        group |= {"max_lr": group["lr"], "min_lr": asked.get("min_lr", 0.0), "wd_mult": 1.0, "lr_mult": 1.0}
    return OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=3e-3, min_lr=asked.get("min_lr", 0.0), lr_warmup_steps=warmup,
        lr_decay_steps=decay, lr_decay_style=asked["lr_decay_style"],
        start_wd=asked.get("start_weight_decay", 0.1), end_wd=asked.get("end_weight_decay", 0.1),
        wd_incr_steps=horizon, wd_incr_style=asked.get("weight_decay_incr_style", "constant"),
    )  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_the_schedule_is_accelerates_over_100_steps(style, parser):
    for lengths, decay in itertools.product(LENGTHS, DECAYS):
        asked = {"lr_decay_style": style, **lengths, **decay}
        plan = from_plugin(asked)
        if style == "inverse-square-root" and not {"lr_warmup_iters", "lr_warmup_fraction"} & asked.keys():
            assert "lr_warmup" in {line.setting for line in plan.lines}  # it would depend on the batch's size
            continue
        run = parsed(parser, plan)
        assert run.trainer.max_steps == asked["train_iters"]
        schedule = LRSchedule(**run.model.init_args.lr_schedule)
        trainer = Trainer(max_steps=run.trainer.max_steps, accelerator="cpu", logger=False, enable_checkpointing=False)
        ours, theirs = _optimizer(), _optimizer()
        mine, other = schedule.build(ours, trainer), _accelerates(asked, theirs)
        for step in range(100):
            for name in ("lr", "weight_decay"):
                expected = theirs.param_groups[0][name]
                assert ours.param_groups[0][name] == pytest.approx(expected, rel=1e-12), (asked, step, name)
            ours.step()
            mine.step()
            other.step(GLOBAL_BATCH)


# Megatron-LM

GPT3 = """--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --num-layers 96 --hidden-size 12288
  --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048 --attention-backend auto
  --micro-batch-size 1 --global-batch-size 1536 --rampup-batch-size 16 16 5859375 --train-iters 500000
  --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5
  --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001 --lr-decay-iters 430000 --data-path corpus
  --split 949,50,1 --log-interval 100 --save-interval 10000 --eval-interval 1000 --save ck --load ck --eval-iters 10
  --tensorboard-dir tb --vocab-file v.json --merge-file m.txt"""
LLAMA = """--tensor-model-parallel-size 2 --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --swiglu
  --num-attention-heads 32 --group-query-attention --num-query-groups 8 --seq-length 8192 --rotary-base 500000
  --position-embedding-type rope --normalization RMSNorm --norm-epsilon 1e-5 --disable-bias-linear --sequence-parallel
  --untie-embeddings-and-output-weights --bf16 --use-distributed-optimizer --overlap-grad-reduce
  --overlap-param-gather --micro-batch-size 1 --global-batch-size 128 --train-samples 1280000 --lr-warmup-samples 12800
  --lr-decay-samples 1000000 --lr 3e-4 --min-lr 3e-5 --tokenizer-type HuggingFaceTokenizer --tokenizer-model llama
  --data-path 0.7 web 0.3 code --data-cache-path cache --use-rope-scaling --transformer-impl transformer_engine
  --attention-softmax-in-fp32 --reset-attention-mask --eod-mask-loss --distributed-timeout-minutes 90 --seed 7"""
BERT = """--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 --max-position-embeddings 512
  --micro-batch-size 4 --global-batch-size 32 --train-iters 1000000 --lr 1e-4 --min-lr 1e-5 --lr-warmup-fraction .01
  --weight-decay 1e-2 --data-path sentences --tokenizer-model bert.json --bert-no-binary-head"""
T5 = """--encoder-num-layers 12 --decoder-num-layers 12 --num-layers 12 --hidden-size 768 --num-attention-heads 12
  --encoder-seq-length 512 --decoder-seq-length 128 --micro-batch-size 16 --global-batch-size 128 --lr 1e-4
  --train-iters 1000000 --optimizer sgd --data-path sentences --tokenizer-model t5.json"""


# The argument lists of train_gpt3_175b_distributed.sh, train_llama3_8b_h100_fp8.sh, train_bert_340m_distributed.sh and
# train_t5_220m_distributed.sh of 2026-08-22, with its variables filled in.
PUBLISHED = {
    "gpt": """--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048
      --max-position-embeddings 2048 --attention-backend auto # Can use (flash/fused/unfused/local)
      --micro-batch-size 1 --global-batch-size 1536 \\
      --step-batch-size-schedule "0:16 2.4B:320 4.8B:624 7.2B:928 9.6B:1232 12B:1536" --train-iters 500000
      --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5
      --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001 --lr-decay-iters 430000
      --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --data-path corpus --vocab-file v.json
      --merge-file m.txt --split 949,50,1 --log-interval 100 --save-interval 10000 --eval-interval 1000 --save ck
      --load ck --eval-iters 10 --tensorboard-dir tb""",
    "llama": """--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
      --group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192
      --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0
      --hidden-dropout 0.0 --swiglu --normalization RMSNorm --init-method-std 0.0134 --attention-backend fused
      --apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear --micro-batch-size 1
      --global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748 --lr-warmup-samples 3906252
      --lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --lr-decay-style cosine
      --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16
      --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc --empty-unused-memory-level 1
      --exit-duration-in-mins 235 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
      --fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-param-gather
      --tensor-model-parallel-size 1 --context-parallel-size 1 --sequence-parallel --mock-data
      --tokenizer-type NullTokenizer --vocab-size 128256 --data-cache-path cache --tiktoken-pattern v2
      --split "'99,1,0'" --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1 --log-interval 1
      --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput --profile --profile-step-start 4
      --profile-step-end 6 --ckpt-format torch_dist --distributed-timeout-minutes 60 --save ck --load ck
      --tensorboard-dir tb""",
    "bert": """--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 512
      --max-position-embeddings 512 --attention-backend auto --micro-batch-size 4 --global-batch-size 32
      --train-iters 1000000 --weight-decay 1e-2 --clip-grad 1.0 --fp16 --lr 0.0001 --lr-decay-iters 990000
      --lr-decay-style linear --min-lr 1.0e-5
      --weight-decay 1e-2 --lr-warmup-fraction .01 --clip-grad 1.0 --tensor-model-parallel-size 8
      --pipeline-model-parallel-size 16 --data-path corpus --vocab-file v.json --split 949,50,1 --log-interval 100
      --save-interval 10000 --eval-interval 1000 --save ck --load ck --eval-iters 10 --tensorboard-dir tb""",
    "t5": """--encoder-num-layers 12 --decoder-num-layers 12 --hidden-size 768 --num-attention-heads 12 --kv-channels 64
      --ffn-hidden-size 3072 --encoder-seq-length 512 --decoder-seq-length 128 --max-position-embeddings 512
      --micro-batch-size 64 --global-batch-size 512 --lr 0.0001 --train-iters 1000000 --lr-decay-iters 1000000
      --lr-decay-style linear --min-lr 0.00001 --weight-decay 1e-2 --lr-warmup-fraction .01 --clip-grad 1.0 --bf16
      --vocab-extra-ids 100 --init-method-std 0.015 --transformer-impl transformer_engine
      --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --attention-backend auto --data-path corpus
      --vocab-file v.txt --tokenizer-type BertWordPieceCase --split 99982,9,9 --log-interval 100 --tensorboard-dir tb
      --save-interval 500 --eval-interval 1000 --eval-iters 10 --distributed-backend nccl --save ck --load ck""",
}
CONFIGS = {"gpt": GPTConfig, "llama": GPTConfig, "bert": BertConfig, "t5": T5Config}


@pytest.fixture(scope="module")
def published(parser):
    """What becomes of the published lines: their plans, and the runs that ``fit --config`` reads of them."""
    plans = {
        name: from_command_line(
            line, "gpt" if name == "llama" else name, num_nodes=16 if name in ("gpt", "bert") else 1
        )
        for name, line in PUBLISHED.items()
    }
    return {name: (plan, parsed(parser, plan)) for name, plan in plans.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_line(name, published):
    plan, run = published[name]
    options = {word for word in PUBLISHED[name].split() if word.startswith("--")}
    assert {line.setting for line in plan.lines} >= options
    assert {line.setting for line in plan.missing} == ({"--fp8-param-gather"} if name == "llama" else set())
    by_hand = {line.setting for line in plan.lines if line.fate == "yours to do" and "transformer-engine" in line.says}
    of_fp8 = {"--fp8-format", "--fp8-amax-history-len", "--fp8-amax-compute-algo"}
    assert by_hand == (of_fp8 if name == "llama" else set())
    CONFIGS[name](**plan.run["model"]["init_args"]["config"])
    # Megatron-LM's own: a mean over micro-batches, unless --calculate-per-token-loss is given.
    assert run.model.init_args.loss_reduction == ("token" if name == "llama" else "micro_batch")
    assert "--calculate-per-token-loss" in {line.setting for line in plan.lines}
    checkpoint, end = run.trainer.callbacks
    assert (checkpoint.class_path.rpartition(".")[2], checkpoint.init_args.dirpath) == ("ModelCheckpoint", "ck")
    assert end.class_path == "lightning_megatron.callbacks.SaveAtEnd"


def test_what_the_published_lines_ask_for_arrives(published):
    run = published["gpt"][1]
    sizes = {0: 16, 1171875: 320, 2343750: 624, 3515625: 928, 4687500: 1232, 5859375: 1536}  # tokens / 2048
    assert run.data.init_args.ramp_up.init_args.sizes == sizes
    assert run.data.init_args.global_batch_size == 1536
    assert run.data.init_args.split == "949,50,1"
    (precision,) = run.trainer.plugins
    assert vars(precision.init_args) == {"precision": "16-mixed", "initial_loss_scale": 2**32, "recipe": None}
    assert run.trainer.precision is None
    assert (run.trainer.val_check_interval, run.trainer.limit_val_batches, run.trainer.log_every_n_steps) == (
        1000,
        10,
        100,
    )
    assert run.trainer.callbacks[0].init_args.every_n_train_steps == 10000
    plan, run = published["llama"]
    assert str(run.trainer.max_time) == "00:03:55:00"
    assert "data" not in plan.run  # there is no data_path, so what was said of the data is for its user to set
    by_hand = {line.setting for line in plan.lines if line.fate == "yours to do"}
    assert by_hand >= {"--split", "--data-cache-path", "--num-workers", "--mock-data", "--decoupled-lr", "--load"}
    assert run.trainer.max_steps == math.ceil(1953125000 / 128)
    config = published["t5"][1].model.init_args.config
    assert (config.num_layers, config.encoder_num_layers, config.decoder_num_layers) == (12, 12, 12)
    assert (config.seq_length, config.decoder_seq_length, config.kv_channels, config.layers) == (512, 128, 64, "torch")
    assert config.extra == {"add_bias_linear": True, "add_qkv_bias": True}
    samples = published["t5"][1].data.init_args.samples.init_args
    assert (samples.seq_length, samples.decoder_seq_length) == (512, 128)


OPTIONS = list(csv.DictReader((ROOT / "tests/assets/megatron_lm_options.tsv").open(), delimiter="\t"))


@pytest.mark.parametrize("model", ["gpt", "bert", "t5"])
def test_every_option_of_megatron_lm_is_accounted_for(model):
    """Of its parser of 2026-08-22: each gets its line, alone as well."""
    assert len(OPTIONS) == 616
    for row in OPTIONS:
        words = [row["option"], *row["value"].split()]
        if row["option"] in ("--start-weight-decay", "--end-weight-decay"):  # Megatron-LM refuses one alone
            words = ["--weight-decay-incr-style", "linear", "--start-weight-decay", "0", "--end-weight-decay", "1"]
        lines = from_command_line(words, model, devices=1).lines
        assert row["option"] in {line.setting for line in lines}, words
        assert all(line.says for line in lines)


def test_the_time_out_after_the_first_step_is_one_of_its_own():
    minutes, seconds = ["--distributed-timeout-minutes", "90"], ["--distributed-timeout-seconds-after-init", "120"]
    for words, says in (
        (minutes, {"timeout": "1:30:00"}),
        (seconds, {"timeout": "0:02:00"}),
        ([*minutes, *seconds], {"start_timeout": "1:30:00", "timeout": "0:02:00"}),
    ):
        plan = from_command_line(words, devices=1)
        strategy = plan.run["trainer"]["strategy"]["init_args"]
        assert {name: strategy[name] for name in strategy if "timeout" in name} == says
        assert {line.setting for line in plan.lines if line.fate == "carried over"} >= set(words[::2])


def test_no_setting_has_two_homes():
    rows = list(_elsewhere())
    names = [name for name, _ in rows]
    assert len(names) == len(set(names))
    assert not set(names) & _PLACED.keys()
    assert {destination.fate for _, destination in rows} == {"not needed", "yours to do", "not here"}


def test_a_setting_at_its_default_asks_for_nothing():
    words = (
        "--moe-upcycling-granularity 1 --main-params-dtype fp32 --mtp-loss-scaling-factor 0.10 --no-rl-skip-bos-token"
    )
    assert not from_command_line(words, devices=1).missing
    plan = from_command_line("--moe-upcycling-granularity 8 --main-params-dtype fp16 --rl-skip-bos-token", devices=1)
    assert [line.setting for line in plan.missing] == [
        "--moe-upcycling-granularity",
        "--main-params-dtype",
        "--rl-skip-bos-token",
    ]


def test_options_of_older_scripts_have_their_line():
    words = "--DDP-impl local --data-impl mmap --activations-checkpoint-method uniform --checkpoint-activations"
    plan = from_command_line(words, devices=1)
    assert {line.setting for line in plan.lines} >= {word for word in words.split() if word.startswith("--")}
    assert {line.setting for line in plan.missing} == {"--activations-checkpoint-method", "--checkpoint-activations"}


def test_arguments_are_read_as_argparse_does():
    plan = from_command_line(
        "--num-layers 4 --bf16 --lr 1e-3 --data-path a --num-layers=8 --bf16 --lr 2e-3 --data-path 0.5 b 0.5 c"
        " --window-size -1,0 --micro-batch-size 2 --no-rl-skip-bos-token --rl-skip-bos-token",
        devices=2,
    )
    run = plan.run
    assert run["model"]["init_args"]["config"]["num_layers"] == 8
    assert run["model"]["init_args"]["optimizer"]["init_args"]["optimizer"]["init_args"]["lr"] == 2e-3
    assert (run["data"]["init_args"]["paths"], run["data"]["init_args"]["weights"]) == (["b", "c"], [0.5, 0.5])
    assert run["data"]["init_args"]["global_batch_size"] == 4  # a micro-batch of each replica


def test_all_mistakes_are_named_at_once():
    with pytest.raises(MigrationError) as failed:
        from_command_line("--num-layrs 2 --bf16 yes --hidden-size many --lr --seed 1 2 --num-layrs 3 --tp 4")
    assert str(failed.value).splitlines() == [
        "--num-layrs: this command knows no setting of Megatron of this name. Did you mean num_layers?",
        "--bf16 yes: it takes no value; leave it out.",
        "--hidden-size='many': use a whole number.",
        "--lr is without its value.",
        "--seed 1 2: it takes one value. Put quotes around words that are one.",
        "--tp: this command knows no setting of Megatron of this name.",
    ]
    with pytest.raises(MigrationError, match=r"ranks, more than the 8 of.*--num-nodes"):
        from_command_line("--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16")


@pytest.mark.parametrize(
    ("model", "words", "fates"),
    [
        ("bert", "--position-embedding-type rope --normalization LayerNorm --untie-embeddings-and-output-weights",
         {"--position-embedding-type": "carried over", "--normalization": "not needed",
          "--untie-embeddings-and-output-weights": "not here"}),
        ("bert", "--window-size 64,0 --disable-bias-linear",
         {"--window-size": "not here", "--disable-bias-linear": "carried over"}),
        ("t5", "--group-query-attention --num-query-groups 2 --disable-bias-linear --swiglu --rotary-base 500000",
         {"--group-query-attention": "not here", "--num-query-groups": "not here",
          "--disable-bias-linear": "not needed", "--swiglu": "carried over", "--rotary-base": "not here"}),
        ("gpt", "--decoder-num-layers 2 --decoder-seq-length 8 --bert-no-binary-head --mask-prob 0.2 --optimizer muon",
         {"--decoder-num-layers": "not needed", "--decoder-seq-length": "not needed",
          "--bert-no-binary-head": "not needed", "--mask-prob": "not needed", "--optimizer": "yours to do"}),
        ("bert", "--mask-prob 0.2 --short-seq-prob 0.3",
         {"--mask-prob": "carried over", "--short-seq-prob": "carried over"}),
    ],
)  # fmt: skip
def test_what_a_family_does_not_have_is_said_and_left_out(model, words, fates, parser):
    sizes = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --data-path d --micro-batch-size 1"
    plan = from_command_line(f"{sizes} {words}", model, devices=1)
    said = {line.setting: line.fate for line in plan.lines}
    assert fates.items() <= said.items()
    parsed(parser, plan)


def test_settings_that_megatron_does_not_look_at_do_not_reach_the_run(parser):
    words = "--train-iters 9 --lr 1e-3 --lr-wsd-decay-iters 4 --lr-warmup-init 1e-5 --rope-scaling-factor 4"
    plan = from_command_line(f"{words} --save-interval 5", devices=1)
    ignored = {line.setting for line in plan.lines if "only with" in line.says}
    assert ignored == {"--lr-wsd-decay-iters", "--lr-warmup-init", "--rope-scaling-factor", "--save-interval"}
    assert "callbacks" not in plan.run["trainer"]
    assert plan.run["trainer"]["limit_val_batches"] == 0  # no --eval-interval
    assert "--eval-interval: Lightning's" in plan.report()


def test_windows_positions_and_seeds():
    words = (
        "--num-layers 6 --window-size 128,0 --window-attn-skip-freq 3 --rotary-seq-len-interpolation-factor 2 --seed 7"
    )
    plan = from_command_line(f"{words} --data-path d --deterministic-mode --full-validation", devices=1)
    config = plan.run["model"]["init_args"]["config"]
    assert (config["sliding_window"], config["sliding_window_layers"]) == (129, [0, 1, 3, 4])
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2}
    both_ways = from_command_line("--num-layers 6 --window-size 64,64 --data-path d", "bert", devices=1)
    assert both_ways.run["model"]["init_args"]["config"]["sliding_window"] == 64
    assert (plan.run["seed_everything"], plan.run["data"]["init_args"]["seed"]) == (7, 7)
    assert (plan.run["trainer"]["deterministic"], plan.run["trainer"]["limit_val_batches"]) == (True, 1.0)


@pytest.mark.parametrize(
    ("arguments", "model", "devices", "nodes"),
    [(GPT3, "gpt", 8, 16), (LLAMA, "gpt", 8, 1), (BERT, "bert", 8, 1), (T5, "t5", 8, 1)],
    ids=["gpt3", "llama", "bert", "t5"],
)
def test_the_command_lines_of_its_examples(arguments, model, devices, nodes, parser, monkeypatch):
    plan = from_command_line(arguments.split(), model, devices=devices, num_nodes=nodes)
    run = parsed(parser, plan)
    assert not plan.missing
    options = {word for word in arguments.split() if word.startswith("--")}
    assert {line.setting for line in plan.lines} >= options
    assert run.model.class_path == {"gpt": "lightning_megatron.GPTModule", "bert": "lightning_megatron.BertModule"}.get(
        model, "lightning_megatron.T5Module"
    )
    assert run.data.init_args.samples.init_args.seq_length == run.model.init_args.config.seq_length


def test_llamas_settings_arrive(parser):
    run = parsed(parser, from_command_line(LLAMA.split(), "gpt"))
    config, strategy, data = run.model.init_args.config, run.trainer.strategy.init_args, run.data.init_args
    assert (config.activation, config.bias, config.tie_embeddings) == ("swiglu", False, False)
    assert (config.num_query_groups, config.position_embedding, config.rotary_base) == (8, "rope", 500000)
    assert config.rope_scaling["factor"] == 8
    assert config.layers == "transformer_engine"
    assert config.extra == {"attention_softmax_in_fp32": True}
    assert (strategy.tp, strategy.sequence_parallel, strategy.distributed_optimizer) == (2, True, True)
    assert strategy.ddp.overlap_grad_reduce
    assert strategy.ddp.overlap_param_gather
    assert strategy.timeout.total_seconds() == 90 * 60
    assert run.trainer.max_steps == 10000
    assert run.trainer.precision == "bf16-mixed"
    schedule = run.model.init_args.lr_schedule
    assert (schedule.unit, schedule.warmup_steps, schedule.decay_steps) == ("samples", 12800, 1000000)
    assert (data.paths, data.weights, data.global_batch_size) == (["web", "code"], [0.7, 0.3], 128)
    samples = data.samples.init_args
    assert (samples.reset_attention_mask, samples.eod_mask_loss, samples.reset_position_ids) == (True, True, False)
    assert run.seed_everything == 7


def test_what_megatron_lm_does_unasked_is_carried_over():
    """Of ``arguments.py`` and ``validate_args`` of Megatron-LM: dropout of 0.1, clipping, two thirds with swiglu."""
    small = ["--num-layers", "2", "--hidden-size", "256", "--num-attention-heads", "4", "--num-query-groups", "2"]
    plan = from_command_line(small, devices=1)
    config = plan.run["model"]["init_args"]["config"]
    assert (config["hidden_dropout"], config["attention_dropout"], config["layernorm_epsilon"]) == (0.1, 0.1, 1e-5)
    assert config["activation"] == "gelu_tanh"  # its fused bias and GELU
    assert "num_query_groups" not in config  # without --group-query-attention
    assert plan.run["trainer"]["gradient_clip_val"] == 1.0
    assert plan.run["seed_everything"] == 1234
    assert "--hidden-dropout=0.1: carried over; config.hidden_dropout (Megatron-LM's default)" in plan.report()
    gated = from_command_line([*small, "--swiglu", "--hidden-dropout", "0"], devices=1).run["model"]["init_args"][
        "config"
    ]
    assert (gated["ffn_hidden_size"], gated["activation"], gated["hidden_dropout"]) == (640, "swiglu", 0)
    exact = from_command_line([*small, "--no-bias-gelu-fusion"], devices=1)
    assert exact.run["model"]["init_args"]["config"]["activation"] == "gelu"
    assert from_command_line(small, "bert", devices=1).run["model"]["init_args"]["config"]["norm_placement"] == "pre"
    t5 = from_command_line(small, "t5", devices=1).run["model"]["init_args"]["config"]
    assert (t5["position_embedding"], t5["normalization"]) == ("learned", "LayerNorm")


def test_samples_are_counted_through_a_ramp():
    arguments = [
        "--data-path",
        "d",
        "--global-batch-size",
        "32",
        "--rampup-batch-size",
        "8",
        "8",
        "96",
        "--train-samples",
        "200",
    ]
    run = from_command_line([*arguments, "--num-layers", "2"], devices=1).run
    rule, consumed, steps = RampUp(8, 8, 96), 0, 0
    while consumed < 200:
        consumed += rule.size(consumed, 32)
        steps += 1
    assert run["trainer"]["max_steps"] == steps > 200 / 32


def test_a_schedule_is_in_samples_where_batches_grow(published):
    """Megatron-LM counts samples: while batches are small its rates move slowly, whatever its options count."""
    schedule = published["gpt"][1].model.init_args.lr_schedule
    assert (schedule.unit, schedule.decay_steps, schedule.warmup_fraction) == ("samples", 430000 * 1536, 0.001)
    ramp = "--num-layers 2 --data-path d --global-batch-size 32 --micro-batch-size 1 --rampup-batch-size 8 8 96"
    rises = "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1"
    by_steps = f"--train-iters 100 --lr-decay-iters 90 --lr-warmup-iters 5 {rises}"
    found = from_command_line(f"{ramp} {by_steps}", devices=1).get(SCHEDULE)
    assert {name: found[name] for name in ("unit", "warmup_steps", "decay_steps", "weight_decay_steps")} == {
        "unit": "samples", "warmup_steps": 160, "decay_steps": 2880, "weight_decay_steps": 3200,
    }  # fmt: skip
    found = from_command_line(f"{ramp} --train-samples 1000 --lr-warmup-fraction 0.1", devices=1).get(SCHEDULE)
    assert (found["unit"], found["decay_steps"]) == ("samples", 1000)


@pytest.mark.parametrize(
    ("words", "paths", "weights"),
    [
        ("a", ["a"], None),
        ("0.3 a 0.7 b", ["a", "b"], [0.3, 0.7]),
        ("2020 2021 2022", ["2020", "2021", "2022"], None),
        ("1 a b c", ["1", "a", "b", "c"], None),
    ],
)
def test_words_of_a_blend_are_read_as_megatron_core_reads_them(words, paths, weights):
    plan = from_command_line(f"--num-layers 2 --data-path {words}", devices=1)
    assert (plan.get("data.init_args.paths"), plan.get("data.init_args.weights")) == (paths, weights)
    assert get_blend_from_list(words.split()) == (paths, weights)
    assert "--global-batch-size" in {line.setting for line in plan.lines if line.fate == "yours to do"}


def test_the_groups_of_the_optimizer_are_megatrons(parser):
    arguments = """--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --vocab-size 32 --lr 2e-3
      --adam-beta2 0.95 --weight-decay 0.3"""
    run = parser.instantiate(parsed(parser, from_command_line(arguments.split(), devices=1)))
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32)
    optimizer = run.model.optimizer.build(layer.named_parameters())
    assert type(optimizer) is torch.optim.AdamW
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in layer.named_parameters():
        assert decays[id(parameter)] == (0.0 if biases_and_vectors(name, parameter) else 0.3), name
    assert optimizer.param_groups[0]["lr"] == 2e-3
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_the_moments_of_the_optimizer_are_carried_over(parser):
    arguments = """--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --vocab-size 32 --lr 2e-3
      --adam-beta2 0.95 --optimizer-cpu-offload --exp-avg-dtype bf16 --exp-avg-sq-dtype fp16"""
    plan = from_command_line(arguments.split(), devices=1)
    optimizer = parser.instantiate(parsed(parser, plan)).model.optimizer.build(torch.nn.Linear(2, 2).named_parameters())
    assert type(optimizer) is LeanAdamW
    kept = ("on_host", "exp_avg_dtype", "exp_avg_sq_dtype")
    assert [optimizer.param_groups[0][name] for name in kept] == [True, "bfloat16", "float32"]
    assert {line.setting for line in plan.missing} == {"--exp-avg-sq-dtype"}
    long = from_command_line([*arguments.replace("0.95", "0.999").replace("fp16", "bf16").split()], devices=1)
    assert {line.setting for line in long.missing} == {"--exp-avg-sq-dtype"}


# As a user does it


@pytest.fixture
def gpt2(tmp_path):
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=32, vocab_size=257)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2-of-mine")
    return tmp_path


@pytest.mark.slow
def test_the_page_on_accelerate(gpt2):
    block = {"megatron_lm_tp_degree": 2, "megatron_lm_num_micro_batches": 4}
    config = {"distributed_type": "MEGATRON_LM", "num_processes": 4, "megatron_lm_config": block}
    (gpt2 / "accelerate_config.yaml").write_text(yaml.safe_dump(config))
    (command,) = blocks("migrate_accelerate.md", "bash")
    assert "num_micro_batches=4: carried over" in shell(gpt2, command)
    assert yaml.safe_load((gpt2 / "run.yaml").read_text())["model"]["init_args"] == {"source": "gpt2-of-mine"}
    plugin, train = blocks("migrate_accelerate.md")
    told = script(gpt2, plugin)
    assert "num_layers_in_first_pipeline_stage: 3" in told
    assert "style: cosine" in told
    script(gpt2, train)
    transformers.AutoModelForCausalLM.from_pretrained(gpt2 / "trained")


@pytest.mark.slow
def test_the_page_on_megatron_lm(tmp_path, parser):
    (command,) = blocks("migrate_megatron_lm.md", "bash")
    shell(tmp_path, command)
    run = parser.parse_path(str(tmp_path / "run.yaml"))
    assert run.trainer.strategy.init_args.micro_batch_size == 4
    assert run.data.init_args.tokenizer == "tokenizer.json"
    (code,) = blocks("migrate_megatron_lm.md")
    assert "'activation': 'swiglu'" in script(tmp_path, code)


@pytest.mark.slow
def test_the_page_on_nemo(tmp_path):
    (code,) = blocks("migrate_nemo2.md")
    script(tmp_path, code)


@pytest.mark.slow
def test_a_migrated_run_trains(gpt2):
    block = {"tp_degree": 2, "pp_degree": 2, "num_micro_batches": 2, "sequence_parallelism": True}
    accelerates = {"distributed_type": "MEGATRON_LM", "num_processes": 4, "use_cpu": True, "mixed_precision": "no"}
    accelerates["megatron_lm_config"] = {f"megatron_lm_{name}": value for name, value in block.items()}
    (gpt2 / "accelerate.yaml").write_text(yaml.safe_dump(accelerates))
    told = shell(gpt2, "lightning-megatron migrate accelerate.yaml --model gpt2-of-mine --out run.yaml")
    assert "tp_degree=2: carried over; MegatronStrategy(tp=)" in told
    fit = "lightning-megatron fit --config run.yaml --trainer.max_steps 2 --trainer.logger CSVLogger"
    data = "--data TextDataModule --data.seq_length 32 --data.batch_size 4"
    shell(gpt2, f"{fit} --trainer.logger.save_dir . --trainer.log_every_n_steps 1 {data}")
    (metrics,) = gpt2.rglob("metrics.csv")
    assert "train_loss" in metrics.read_text()
    with pytest.raises(AssertionError, match="run.yaml is there already. Add --overwrite"):
        shell(gpt2, "lightning-megatron migrate accelerate.yaml --out run.yaml")


def _accelerate(**changed) -> dict:
    return {"distributed_type": "MEGATRON_LM", "num_processes": 4, **changed}


def test_accelerates_fp8():
    plan = from_accelerate(_accelerate(mixed_precision="fp8", fp8_config={"backend": "TE", "margin": 2}))
    assert plan.run["trainer"]["precision"] == "transformer-engine"
    by_hand = {line.setting: line.says for line in plan.lines if line.fate == "yours to do"}
    assert "layers='transformer_engine'" in by_hand["fp8"]
    assert "recipe=DelayedScaling" in by_hand["fp8_config"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (_accelerate(distributed_type="FSDP"), "distributed_type=FSDP: .*distributed_type: MEGATRON_LM"),
        (
            _accelerate(megatron_lm_config={"megatron_lm_tp_degre": 2}),
            r"megatron_lm_tp_degre: .*megatron_lm_tp_degree\?",
        ),
        (_accelerate(megatron_lm_config={"tp_degree": 2}), r"tp_degree: .*Did you mean megatron_lm_tp_degree\?"),
        (_accelerate(megatron_lm_config={"megatron_lm_tp_degree": "two"}), "tp_degree='two': use a whole number"),
        (_accelerate(megatron_lm_config={"megatron_lm_tp_degree": 3}), "tp=3.* do not divide the world of 4. Use"),
        (_accelerate(mixed_precision="fp4"), "mixed_precision=fp4: use one of no, bf16, fp16, fp8"),
        (_accelerate(num_machines=3), "num_processes=4: 3 machines do not share them evenly"),
        (_accelerate(num_procesess=8), r"num_procesess: .*Did you mean num_processes\?"),
        (_accelerate(megatron_lm_config={"megatron_lm_sequence_parallelism": "maybe"}), "'maybe': use true or false"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_accelerate_would_not_say(config, says):
    with pytest.raises(ValueError, match=says):
        from_accelerate(config)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--tensor-model-paralel-size 2", r"--tensor-model-paralel-size: .*Did you mean tensor_model_parallel_size\?"),
        ("--num-layers", "--num-layers is without its value"),
        ("--bf16 true", "--bf16 true: it takes no value"),
        ("--num-layers many", "'many': use a whole number"),
        ("gpt", "'gpt': start with an option"),
        ("--bf16 --fp16", "bf16 and fp16: give one"),
        ("--train-iters 5 --train-samples 7", "train_iters=5 and train_samples=7: give one"),
        ("--train-iters 9 --lr-warmup-samples 5 --lr-warmup-iters 5", "lr_warmup_iters=5: this run counts samples"),
        ("--lr-warmup-fraction 0.1 --lr-warmup-iters 5", "lr_warmup_fraction and lr_warmup_iters: give one"),
        ("--tensor-model-parallel-size 3", "tp=3.* do not divide the world of 8"),
        ("--num-layers 10 --num-layers-per-virtual-pipeline-stage 3", "10 layers on 1 stages are no multiple"),
        ("--rampup-batch-size 16 --global-batch-size 64", "use START INCREMENT SAMPLES"),
        ("--lr-decay-style cosin", "'cosin': use one of constant, linear, cosine"),
        ("--data-path d --global-batch-size 12", "global_batch_size=12: 8 data-parallel replicas"),
        ("--data-path d --global-batch-size 16 --micro-batch-size 4", "batch_size=2 is not a multiple"),
    ],
)
def test_mistakes_in_megatrons_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        from_command_line(arguments.split())


def test_what_is_not_here_ends_with_an_error_and_the_run_all_the_same(tmp_path):
    with pytest.raises(AssertionError, match="the run does without --moe-latent-size") as failed:
        shell(tmp_path, "lightning-megatron migrate megatron-args -- --num-layers 2 --moe-latent-size 8")
    assert "num_layers: 2" in str(failed.value)
    with pytest.raises(AssertionError, match="Give Megatron-LM's arguments behind --"):
        shell(tmp_path, "lightning-megatron migrate megatron-args")
    with pytest.raises(AssertionError, match="nowhere.yaml"):
        shell(tmp_path, "lightning-megatron migrate nowhere.yaml")


def test_all_mistakes_of_a_configuration_are_named_at_once():
    with pytest.raises(MigrationError, match=r"num_procesess: .*num_processes\?\nmixed: .*no such setting"):
        from_accelerate({"num_procesess": 8, "mixed": 1})
    block = {"megatron_lm_tp_degre": 2, "pp_degree": 2}
    with pytest.raises(
        MigrationError, match=r"tp_degre: .*tp_degree\?\nmegatron_lm_config.pp_degree: .*lm_pp_degree\?"
    ):
        from_accelerate(_accelerate(megatron_lm_config=block))
    with pytest.raises(MigrationError, match=r"tp_degre: .*\npp: .*no such argument"):
        from_plugin({"tp_degre": 2, "pp": 1})
    with pytest.raises(MigrationError, match=r"\['nun_layers'\].*\nother_megatron_args\['lr'\]='fast': use a number"):
        from_plugin({"other_megatron_args": {"nun_layers": 2, "lr": "fast"}})
    with pytest.raises(MigrationError, match="other_megatron_args='--lr 1': give Megatron's names and their values"):
        from_plugin({"other_megatron_args": "--lr 1"})
    plan = from_accelerate(_accelerate(), environment={"MEGATRON_LM_TP_DEGRE": "2"})
    assert (
        "MEGATRON_LM_TP_DEGRE=2: not needed; accelerate reads no such variable. Did you mean tp_degree?"
        in plan.report()
    )
    both = from_plugin({"recompute_activations": True, "recompute_granularity": "full"})
    assert "recompute_activations" in {line.setting for line in both.lines}


@pytest.mark.parametrize(
    ("words", "recompute"),
    [
        ("--recompute-activations", "selective"),
        ("--recompute-granularity selective --recompute-modules core_attn mlp", ["core_attn", "mlp"]),
        ("--recompute-granularity selective --recompute-modules moe_act shared_experts", ["mlp_act", "mlp"]),
        ("--recompute-granularity selective --recompute-modules some", "selective"),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", "full"),
        ("--recompute-granularity full --recompute-method block --recompute-num-layers 3", 3),
        ("--recompute-method block --recompute-num-layers 3", None),
    ],
)
def test_recomputation(words, recompute):
    plan = from_command_line(words.split(), "gpt")
    assert plan.run["trainer"]["strategy"]["init_args"].get("recompute") == recompute
    assert {line.setting for line in plan.lines} >= {word for word in words.split() if word.startswith("--")}
    assert len(plan.missing) == ("some" in words)


# Mixtral 8x7B's and DeepSeek-V3's experts in Megatron-LM's examples, and smaller ones.
MIXTURES = [
    (
        "--num-layers 32 --num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm"
        " --moe-token-dispatcher-type allgather --moe-layer-freq 1",
        {"num": 8, "top_k": 2, "balancing": "aux", "aux_weight": 0.01},
    ),
    (
        "--num-layers 4 --num-experts 256 --moe-router-topk 8 --moe-ffn-hidden-size 2048"
        " --moe-shared-expert-intermediate-size 2048 --moe-layer-freq ([0]*1+[1]*3) --moe-router-score-function sigmoid"
        " --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3 --moe-router-pre-softmax"
        " --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0 --moe-router-dtype fp32"
        " --moe-router-num-groups 8 --moe-router-group-topk 2 --moe-router-topk-scaling-factor 2.5",
        {
            "num": 256, "top_k": 8, "ffn_hidden_size": 2048, "shared_ffn_hidden_size": 2048, "router": "sigmoid",
            "bias_rate": 1e-3, "balancing": "bias", "layers": [1, 2, 3], "groups": 8, "top_k_groups": 2,
            "group_scores": 4, "scale": 2.5,
        },
    ),
    (
        "--num-layers 6 --num-experts 4 --moe-router-pre-softmax --moe-z-loss-coeff 1e-3 --moe-layer-freq 2"
        " --moe-expert-capacity-factor 1.5 --moe-shared-expert-intermediate-size 8 --moe-shared-expert-gate",
        {
            "num": 4, "top_k": 2, "normalize_top_k": False, "balancing": "none", "z_weight": 1e-3, "layers": [0, 2, 4],
            "capacity_factor": 1.5, "eval_capacity_factor": 1.5, "shared_ffn_hidden_size": 8, "shared_gate": True,
        },
    ),
    (
        "--num-layers 2 --num-experts 4 --moe-router-topk 1 --moe-router-score-function sigmoid"
        " --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-3 --moe-input-jitter-eps 1e-2"
        " --moe-router-force-load-balancing --moe-token-drop-policy position --moe-pad-expert-input-to-capacity"
        " --moe-expert-capacity-factor 2 --moe-shared-expert-overlap",
        {
            "num": 4, "top_k": 1, "normalize_top_k": False, "router": "sigmoid", "balancing": "global_aux",
            "aux_weight": 1e-3, "capacity_factor": 2.0, "eval_capacity_factor": 2.0,
        },
    ),
    (
        "--num-layers 2 --num-experts 4 --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-3"
        " --transformer-impl transformer_engine",
        {"num": 4, "top_k": 2, "balancing": "seq_aux", "aux_weight": 1e-3},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("words", "experts"), MIXTURES, ids=["mixtral", "deepseek", "small", "forced", "sequences"])
def test_experts(words, experts, parser):
    words = f"{words} --hidden-size 64 --num-attention-heads 4 --disable-bias-linear --expert-model-parallel-size 2"
    plan = from_command_line(words, "gpt", devices=2)
    assert not plan.missing
    assert [line.setting for line in plan.lines if line.fate == "yours to do"] == ["devices"]
    assert {line.setting for line in plan.lines} >= {word for word in words.split() if word.startswith("--")}
    config = plan.run["model"]["init_args"]["config"]
    assert config["experts"] == experts
    assert plan.get("trainer.strategy.init_args.kernels.expert_dispatch") == way(words)
    assert set(config.get("extra", {})) == EXTRA.intersection(word[2:].replace("-", "_") for word in words.split())
    assert "layers" not in config
    pre_softmax = [line.fate for line in plan.lines if line.setting == "--moe-router-pre-softmax"]
    assert pre_softmax in ([], ["not needed" if "sigmoid" in words else "carried over"])
    GPTConfig(**{"vocab_size": 64, "seq_length": 8, **config, "experts": Experts(**experts)})  # nothing is refused
    run = parsed(parser, plan)
    assert run.trainer.strategy.init_args.ep == 2
    made = run.model.init_args.config.experts
    assert {name: getattr(made, name) for name in experts} == experts


@pytest.mark.parametrize(
    ("more", "differs"),
    [
        ("", True),
        (" --moe-router-group-topk 2", False),  # of each group the best alone, which is the same of both
        (" --moe-router-pre-softmax", False),
        (" --moe-router-score-function sigmoid", False),
    ],
)
def test_groups_that_are_ranked_by_other_scores_are_told(more, differs):
    words = "--num-layers 2 --num-experts 8 --moe-router-topk 2 --moe-router-num-groups 4 --moe-router-group-topk 1"
    plan = from_command_line(f"{words}{more} --hidden-size 64 --num-attention-heads 4".split(), "gpt")
    (told,) = [line.says for line in plan.lines if line.setting == "--moe-router-group-topk"]
    assert ("by their best logits" in told) == differs


# DeepSeek-V3's attention in Megatron-LM's example, a stretched and a plain one.
LATENTS = [
    (
        "--q-lora-rank 24 --kv-lora-rank 8 --qk-head-dim 6 --qk-pos-emb-head-dim 4 --v-head-dim 8 --kv-channels 6"
        " --rotary-scaling-factor 40 --mscale 1.0 --mscale-all-dim 0.5 --transformer-impl transformer_engine"
        " --mtp-num-layers 1 --mtp-loss-scaling-factor 0.3 --cache-mla-latents",
        {"q_lora_rank": 24, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8},
        {"mscale": 1.0, "mscale_all_dim": 0.5},
    ),
    (
        "--rotary-scaling-factor 8 --mscale 0.5 --rotary-percent 1.0",
        {"kv_lora_rank": 32, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        {"attention_factor": 1 + 0.05 * math.log(8)},
    ),
    (
        "--kv-lora-rank 16 --rope-type rope --use-rope-scaling",
        {"kv_lora_rank": 16, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        None,
    ),
]


@pytest.mark.parametrize(("words", "sizes", "stretch"), LATENTS, ids=["deepseek", "stretched", "plain"])
def test_latent_attention(words, sizes, stretch, parser):
    words = f"--num-layers 2 --hidden-size 64 --num-attention-heads 4 --position-embedding-type rope {words}"
    words += " --multi-latent-attention --qk-layernorm --disable-bias-linear --normalization RMSNorm"
    plan = from_command_line(words, "gpt", devices=1)
    assert not plan.missing
    assert [line.setting for line in plan.lines if line.fate == "yours to do"] == ["devices"]
    assert {line.setting for line in plan.lines} >= {word for word in words.split() if word.startswith("--")}
    config = parsed(parser, plan).model.init_args.config
    assert {name: getattr(config.latent_attention, name) for name in sizes} == sizes
    assert (config.mtp, config.mtp_weight) == ((1, 0.3) if "mtp" in words else (0, 0.1))
    scaling = config.rope_scaling
    assert (scaling is None) == (stretch is None)
    assert stretch is None or scaling.items() >= {"rope_type": "yarn", "original_max_position_embeddings": 4096}.items()
    assert stretch is None or {name: scaling.get(name) for name in stretch} == pytest.approx(stretch)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--position-embedding-type rope", "without qk_layernorm Megatron-LM has no norms of latents"),
        ("--qk-layernorm", "beside multi-latent attention there are no learned positions"),
        ("--qk-layernorm --group-query-attention --num-query-groups 2", "makes keys and values for each head"),
        ("--qk-layernorm --rotary-percent 0.5", "says how many channels are rotated"),
        ("--rope-type rope --rotary-scaling-factor 4 --mscale-all-dim 1", "YaRN alone stretches"),
    ],
)
def test_what_latent_attention_has_not(words, says):
    plan = from_command_line(f"--num-layers 2 --multi-latent-attention {words}", "gpt", devices=1)
    assert any(says in line.says for line in plan.missing)
    assert not from_command_line("--kv-lora-rank 8 --v-head-dim 4", "gpt", devices=1).missing


EXTRA = {
    "moe_input_jitter_eps",
    "moe_router_force_load_balancing",
    "moe_token_drop_policy",
    "moe_shared_expert_overlap",
}


def way(words: str) -> str | None:
    return words.partition("--moe-token-dispatcher-type ")[2].partition(" ")[0] or None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--num-experts 8 --moe-router-load-balancing-type sinkhorn", "balancing is one of aux_loss, seq_aux_loss"),
        ("--num-experts 8 --moe-token-dispatcher-type flex", "tokens are sent with alltoall"),
        (
            "--num-experts 8 --moe-router-load-balancing-type aux_loss global_aux_loss --moe-aux-loss-coeff 1e-2 1e-3",
            "beside Experts(balancing='aux') there is no further loss",
        ),
        (
            "--num-experts 8 --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
            " --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4",
            "beside Experts(balancing='bias') there is no further loss",
        ),
        ("--num-experts 8 --moe-router-dtype fp64", "a router computes in fp32 here"),
    ],
)
def test_what_experts_have_not(words, says):
    plan = from_command_line(f"--num-layers 2 {words}", "gpt", devices=1)
    assert any(says in line.says for line in plan.missing)
    assert not from_command_line("--moe-router-topk 8", "gpt", devices=1).missing
    (of_bert,) = from_command_line("--num-layers 2 --num-experts 8", "bert", devices=1).missing
    assert "only a GPT that is built from its sizes" in of_bert.says
    (freq,) = [
        line
        for line in from_command_line("--num-experts 8 --moe-layer-freq 2", "gpt", devices=1).lines
        if line.setting == "--moe-layer-freq"
    ]
    assert freq.fate == "yours to do"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--moe-layer-freq [1]*3", "it says of 3 layers whether they have experts, of 2"),
        ("--moe-layer-freq 0", "use a number, or a list"),
        (
            "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 1",
            "2 kinds of moe_router_load_balancing_type need as many",
        ),
    ],
)
def test_settings_of_experts_that_fit_nothing(words, says):
    with pytest.raises(MigrationError, match=says):
        from_command_line(f"--num-layers 2 --num-experts 8 {words}", "gpt")


@pytest.mark.parametrize(
    ("words", "cp_comm", "fate"),
    [
        ("--context-parallel-size 2 --cp-comm-type p2p", "ring", "carried over"),
        ("--context-parallel-size 2 --cp-comm-type all_gather all_gather", "all_gather", "carried over"),
        ("--context-parallel-size 2 --cp-comm-type a2a", "all_to_all", "carried over"),
        ("--context-parallel-size 4 --cp-comm-type a2a+p2p", None, "not here"),
        ("--context-parallel-size 2 --cp-comm-type a2a p2p", None, "not here"),
        ("--cp-comm-type p2p", None, "not needed"),
    ],
)
def test_how_attention_reaches_the_tokens_of_other_ranks(words, cp_comm, fate):
    plan = from_command_line(words.split(), "gpt", devices=8)
    assert plan.run["trainer"]["strategy"]["init_args"].get("cp_comm") == cp_comm
    assert {line.fate for line in plan.lines if line.setting == "--cp-comm-type"} == {fate}


@pytest.mark.parametrize(
    ("words", "layers", "vp"),
    [
        ("--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 3", [1, 4, 4, 3], None),
        ("--decoder-last-pipeline-num-layers 3", [3, 3, 3, 3], None),
        ("--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split", None, None),
        (
            "--num-layers 14 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
            " --num-layers-per-virtual-pipeline-stage 2",
            [1, 2, 2, 2, 2, 2, 2, 1],
            2,
        ),
        ("--pipeline-model-parallel-layout Et*3|(t*3|)*2t*3L", "Et*3|(t*3|)*2t*3L", None),
        ("--pipeline-model-parallel-layout E|(tt|)*6L", "E|(tt|)*6L", 2),
    ],
)
def test_layers_of_stages(words, layers, vp):
    words = ["--num-layers", "12", "--pipeline-model-parallel-size", "4", *words.split()]
    if layers is None:
        with pytest.raises(MigrationError, match="num_layers=12 cannot be shared out so over pp=4"):
            from_command_line(words, "gpt")
        return
    plan = from_command_line(words, "gpt", devices=4)
    strategy = plan.run["trainer"]["strategy"]["init_args"]
    assert (strategy["layers_per_stage"], strategy.get("vp")) == (layers, vp)
    assert {line.setting for line in plan.lines if line.fate == "carried over"} >= {
        word for word in words if word.startswith("--")
    }


def test_layers_of_stages_where_nobody_knows_how_many_layers_there_are():
    words = "--pipeline-model-parallel-size 4 --decoder-last-pipeline-num-layers 3"
    plan = from_command_line(words.split(), "gpt")
    assert plan.run["model"]["init_args"]["config"]["extra"] == {"num_layers_in_last_pipeline_stage": 3}
    for words, fate in (
        ("--decoder-last-pipeline-num-layers 3", "not needed"),
        ("--pipeline-model-parallel-size 4 --decoder-last-pipeline-num-layers 3", "yours to do"),
    ):
        plan = from_command_line(words.split(), "t5", devices=4)
        assert {line.fate for line in plan.lines if line.setting.startswith("--decoder")} == {fate}


def test_plugin_mistakes():
    with pytest.raises(MigrationError, match=r"tp_degre: .* no such argument. Did you mean tp_degree\?"):
        from_plugin({"tp_degre": 2})
    with pytest.raises(MigrationError, match=r"other_megatron_args\['nun_layers'\].*Did you mean num_layers\?"):
        from_plugin({"other_megatron_args": {"nun_layers": 2}})
