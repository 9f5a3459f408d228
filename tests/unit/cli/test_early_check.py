"""Names that do not exist are found without importing anything heavy, and are those that the whole parser refuses."""

import dataclasses
import functools
import inspect
import os
import re
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import yaml
from megatron.core.transformer import TransformerConfig

import lightning_megatron
import lightning_megatron.callbacks
import lightning_megatron.data
from lightning_megatron.cli.early_check import TOP, find_faults
from lightning_megatron.cli.main import main
from lightning_megatron.cli.shell_completion import _parsers_of_training
from lightning_megatron.distributed import signatures
from lightning_megatron.models.core_fields import core_fields
from tests.support.pages import ROOT

CLASSES = [
    *(getattr(lightning_megatron, name) for name in lightning_megatron.__all__ if name[0].isupper()),
    *(getattr(lightning_megatron.data, name) for name in lightning_megatron.data.__all__),
    *(getattr(lightning_megatron.callbacks, name) for name in lightning_megatron.callbacks.__all__),
    *(getattr(pl.callbacks, name) for name in pl.callbacks.__all__),
    pl.Trainer,
    TransformerConfig,
]


@pytest.mark.parametrize("cls", [each for each in CLASSES if inspect.isclass(each)], ids=lambda cls: cls.__name__)
def test_arguments_are_read_from_the_source_as_python_has_them(cls):
    read = signatures.arguments_of(f"{cls.__module__}.{cls.__qualname__}")
    if read is None:
        return  # not sure
    assert list(read) == [name for name in inspect.signature(cls).parameters if name not in ("args", "kwargs")]


def test_the_fields_of_megatron_core_are_read(monkeypatch):
    fields = {each.name: each.type is bool for each in dataclasses.fields(TransformerConfig) if each.init}
    assert core_fields() == fields
    monkeypatch.setattr("lightning_megatron.models.core_fields.arguments_of", lambda path: None)
    assert core_fields.__wrapped__() == fields  # imported, where the source does not tell


def test_arguments_of_a_method_are_read_but_for_those_that_it_collects():
    (*named, collected) = inspect.signature(lightning_megatron.AutoModule.from_pretrained).parameters
    assert signatures.named_arguments_of("lightning_megatron.AutoModule", "from_pretrained") == tuple(named)
    assert collected == "arguments"
    assert signatures.named_arguments_of("lightning_megatron.AutoModule", "nothing") == ()


def test_most_classes_are_read():
    sure = ["MegatronStrategy", "GPTModule", "BertModule", "T5Module", "GPTConfig", "BertConfig", "T5Config", "LoRA",
            "Kernels", "Checkpointing", "LRSchedule"]  # fmt: skip
    assert all(signatures.arguments_of(f"lightning_megatron.{name}") for name in sure)
    data = ["TextDataModule", "HFDataModule", "ChatDataModule", "MegatronDataModule"]
    assert all(signatures.arguments_of(f"lightning_megatron.data.{name}") for name in data)


def test_the_arguments_at_the_top_are_the_parsers():
    parsers = _parsers_of_training().values()
    options = {o for parser in parsers for action in parser._actions for o in action.option_strings}
    assert {option[2:].partition(".")[0] for option in options if option.startswith("--")} == TOP


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--trainer.devcies 2", "there is no argument --trainer.devcies; did you mean --trainer.devices?"),
        ("--trainer.precsion=16", "there is no argument --trainer.precsion; did you mean --trainer.precision?"),
        ("--trainer.strategy.tpp 2",
         "there is no argument --trainer.strategy.tpp; did you mean --trainer.strategy.tp?"),
        ("--modle GPTModule", "there is no argument --modle; did you mean --model?"),
        ("--max_steps 3", "there is no argument --max_steps; it is --trainer.max_steps"),
        ("--model GPTModule --model.hidden_size 3",
         "there is no argument --model.hidden_size; it is --model.config.hidden_size"),
        ("--model GPTModule --model.config.n_layers 3",
         "there is no argument --model.config.n_layers; did you mean --model.config.num_layers?"),
        ("--model GPTModule --model.config.latent.kv_lora_rank 3",
         "there is no argument --model.config.latent; did you mean --model.config.latent_attention?"),
        ("--model GPTModule --model.lora.alhpa 3",
         "there is no argument --model.lora.alhpa; did you mean --model.lora.alpha?"),
        ("--trainer.strategy.kernels.atention flash",
         "there is no argument --trainer.strategy.kernels.atention; did you mean"
         " --trainer.strategy.kernels.attention?"),
        ("--data ChatDataModule --data.seqlen 4",
         "there is no argument --data.seqlen; did you mean --data.seq_length?"),
        ("--model AutoModule", "model: AutoModule makes a module by a method: write"
         " lightning_megatron.AutoModule.from_pretrained"),
        ("--trainer.callbacks.0.class_path=ModelCheckpoint --trainer.callbacks.0.every_n_epoch=1",
         "--trainer.callbacks.0: an option adds a callback, and takes no number; write --trainer.callbacks+=NAME, and"
         " behind it --trainer.callbacks.ARGUMENT"),
        ("--trainer.accelerator tpu",
         "--trainer.accelerator=tpu: MegatronStrategy trains on CPU and CUDA devices; use cpu or gpu"),
        ("--trainer.accelerator gpuu", "--trainer.accelerator=gpuu: it is unknown; did you mean gpu?"),
        ("--trainer.devices 2 --trainer.devices 0",
         "--trainer.devices=0: use a number from 1, a list of numbers, or auto"),
        ("--trainer.devices four", "--trainer.devices=four: use a number from 1, a list of numbers, or auto"),
        ("--trainer.strategy.check_loss true", "MegatronStrategy(check_loss='true'): use on_nonfinite='raise'."),
    ],
)  # fmt: skip
def test_options_that_do_not_exist(given, told):
    assert find_faults(given.split()) == [told]


@pytest.mark.parametrize(
    "given",
    [
        "--trainer.devices 2 --trainer.strategy MegatronStrategy --trainer.strategy.tp 2",
        "--model GPTModule --model.config.num_layers 2 --model.lora.rank 2 --data TextDataModule --data.seq_length 3",
        "--trainer.max_st 3",  # jsonargparse takes abbreviations
        "--trainer.devices 0 --trainer.devices 2,3 --trainer.accelerator my_own",
        "--trainer.strategy DDPStrategy --trainer.accelerator tpu --trainer.devices -1",
        "--model mine.Module --model.anything 3 --data.anything 4",
        "--trainer.strategy DDPStrategy --trainer.strategy.find_unused_parameters true",
        "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_epochs 3",
        "--trainer.logger CSVLogger --trainer.logger.save_dir x --optimizer AdamW --optimizer.lr 1",
        "--model GPTModule --model.optimizer torch.optim.AdamW --model.optimizer.lr 1e-3",
        "--trainer.help --model.help GPTModule --print_config=skip_null",
        "--config {trainer:{max_steps:3}} --config s3://bucket/run.yaml",
    ],
)  # fmt: skip
def test_what_may_be_right_is_left_alone(given):
    assert find_faults(given.split()) == []


@pytest.mark.parametrize("name", ["AutoModule", "lightning_megatron.AutoModule.from_pretrained"])
def test_the_help_of_auto_module_has_the_arguments_of_from_pretrained(name, capsys):
    main(["fit", "--model.help", name])
    shown = capsys.readouterr().out
    assert "--model.source SOURCE" in shown
    assert "--model.lora LORA" in shown


def test_every_recipe_passes():
    recipes = sorted((ROOT / "examples").rglob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert find_faults(["--config", str(recipe)]) == [], recipe


def test_keys_of_yaml_have_their_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        """trainer:
  max_step: 3
  strategy:
    class_path: MegatronStrategy
    init_args: {tp: 2, tensor_parallel: 3}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {save_topk: 1}
model:
  class_path: GPTModule
  init_args:
    hidden_size: 3
    config:
      n_layers: 2
dta:
  class_path: TextDataModule
"""
    )
    init = "there is no argument trainer.strategy.init_args"
    assert find_faults(["--config=run.yaml"]) == [
        "run.yaml:2: there is no argument trainer.max_step; did you mean trainer.max_steps?",
        f"run.yaml:5: {init}.tensor_parallel; did you mean trainer.strategy.init_args.tp?",
        "run.yaml:8: there is no argument trainer.callbacks.0.init_args.save_topk; did you mean"
        " trainer.callbacks.0.init_args.save_top_k?",
        "run.yaml:12: there is no argument model.init_args.hidden_size; it is model.init_args.config.hidden_size",
        "run.yaml:14: there is no argument model.init_args.config.n_layers; did you mean"
        " model.init_args.config.num_layers?",
        "run.yaml:15: there is no argument dta; did you mean data?",
    ]


def test_arguments_beside_a_class_are_sent_to_its_init_args(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("trainer:\n  strategy: {class_path: MegatronStrategy, tp: 2}\n")
    told = "trainer.strategy.tp is beside class_path: put tp under init_args"
    assert find_faults(["--config", "run.yaml"]) == [f"run.yaml:2: {told}"]


def test_merged_keys_are_read_where_they_are_merged(tmp_path):
    text = "trainer:\n  strategy:\n    class_path: MegatronStrategy\n    init_args: {<<: &sizes {tp: 2}, pp: 2}\n"
    (tmp_path / "run.yaml").write_text(text)
    assert find_faults(["--config", str(tmp_path / "run.yaml")]) == []
    (tmp_path / "run.yaml").write_text(text.replace("tp: 2", "tpp: 2"))
    (told,) = find_faults(["--config", str(tmp_path / "run.yaml")])
    assert told.endswith("did you mean trainer.strategy.init_args.tp?")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("trainer: [1, 2\nmodel: 3\n", "run.yaml:2:6: this is no YAML: expected ',' or ']', but got ':'"),
        ("", "run.yaml is empty; a run has the keys trainer, model and data there"),
        ("- trainer\n", "run.yaml is no mapping; a run has the keys trainer, model and data there"),
    ],
)
def test_files_that_are_no_run(text, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    assert find_faults(["-c", "run.yaml"]) == [told]
    assert find_faults(["--config", "rnu.yaml"]) == ["--config rnu.yaml: there is no such file; did you mean run.yaml?"]
    (tmp_path / "run.yaml").rename((tmp_path / "below").mkdir() or tmp_path / "below" / "run.yaml")
    told = ["--config run.yaml: there is no such file; did you mean below/run.yaml?"]
    assert find_faults(["--config", "run.yaml"]) == told


RUN = (ROOT / "examples/recipes/tiny.yaml").read_text()
SAVE = "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {save_top_k: 1}}]}"
STOP = "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: loss}}]}"
KERNELS = "{tp: 2, kernels: {class_path: lightning_megatron.Kernels, init_args: {}}}"
OF_DDP = ["--trainer.strategy.find_unused_parameters", "true"]
OTHER_STRATEGY = ["lightning.pytorch.strategies.SingleDeviceStrategy", "--trainer.strategy.device", "cpu"]
VALID = {
    "a file as text": (RUN, ["--config", '{"trainer": {"devices": 2}}']),
    "a file by its URL": (RUN, ["--config", (ROOT / "examples/recipes/tiny.yaml").as_uri()]),
    "JSON with tabs": ('{\n\t"trainer": {\n\t\t"devices": 2\n\t}\n}', []),
    "a merge of YAML": (RUN.replace("  accelerator: cpu", "  <<: {accelerator: cpu}"), []),
    "a list that is extended": (RUN, ["--config", "{trainer: {callbacks+: []}}"]),
    "another strategy than the file's": (RUN, ["--trainer.strategy", *OTHER_STRATEGY]),
    "a trainer as text": (RUN, ["--trainer", "{strategy: {class_path: DDPStrategy}}", *OF_DDP]),
    "other callbacks than the first file's": (SAVE, ["--config", "stop.yaml"]),
    "a dataclass by its name": (RUN.replace("{tp: 2, pp: 2}", KERNELS), []),
}


@pytest.mark.parametrize(("text", "more"), VALID.values(), ids=VALID)
def test_what_jsonargparse_takes_is_left_alone(text, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    (tmp_path / "stop.yaml").write_text(STOP)
    arguments = ["--config", str(ROOT / "examples/recipes/tiny.yaml"), "--config", "run.yaml", *more]
    _parsers_of_training()["fit"].parse_args(arguments)  # it ends the process if it refuses
    assert find_faults(arguments) == []


def test_a_pipe_is_left_to_be_read_once(tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    assert find_faults(["--config", str(tmp_path / "run.yaml")]) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--verison", "error: there is no argument --verison; did you mean --version?"),
        ("check", "error: run.yaml is missing; usage: lightning-megatron check "),
        ("fit", "error: --model is required; give it here or in a --config file, such as examples/recipes/tiny.yaml\n"
         "See lightning-megatron fit --help\n"),
        ("export --adapter", "error: checkpoint and out are missing; usage: lightning-megatron export "),
    ],
)  # fmt: skip
def test_light_commands_say_what_is_missing(given, told, capsys):
    with pytest.raises(SystemExit):
        main(given.split())
    assert capsys.readouterr().err.startswith(told)


MEGATRONS = """--num-layers 2 --hidden-size 32 --num-attention-heads 4 --data-path d --bf16 --recompute-activations
  --micro-batch-size 1 --global-batch-size 32 --rampup-batch-size 8 8 96 --train-samples 960 --lr 1
  --exp-avg-dtype bf16
  --lr-decay-style cosine --lr-warmup-samples 8 --tensor-model-parallel-size 2
  --overlap-p2p-communication-warmup-flush"""
LIGHT = {
    "version": ["--version"],
    "help": ["--help"],
    "nothing": [],
    "show": ["show", "tp=2,pp=2,world=8"],
    "no command": ["shwo"],
    "no module": ["fit", "--trainer.max_steps", "3"],
    "migrate": ["migrate", "megatron-args", "--devices", "8", "--", *MEGATRONS.split()],
    "mistyped": ["fit", "--trainer.devcies", "2"],
    "mistyped in check": ["check", "examples/recipes/tiny.yaml", "--trainer.devcies", "2"],
}
CHILD = """
import sys
sys.argv = ["lightning-megatron", *sys.argv[1:]]
from lightning_megatron.cli.main import main
try:
    main()
except SystemExit as end:
    print(end.code, file=sys.stderr)
heavy = {"torch", "lightning", "megatron.core", "transformers", "numpy", "jsonargparse"} & set(sys.modules)
print(sorted(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", LIGHT.values(), ids=LIGHT)
def test_light_commands_import_nothing_heavy(arguments):
    command = [sys.executable, "-c", CHILD, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout or "error: " in done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


RUN = """
trainer: {strategy: {class_path: MegatronStrategy, init_args: {STRATEGY}}}
model: {class_path: GPTModule, init_args: {MODULE, config: {num_layers: 2, CONFIG}}}
"""


@pytest.mark.parametrize(
    ("place", "line", "told"),
    [
        ("CONFIG", "experts: 4", "config.experts is 4; it takes arguments of Experts: num, top_k, .*: {num: ...}"),
        ("CONFIG", "experts: [4]", "config.experts is a list; it takes arguments of Experts"),
        ("CONFIG", "experts: many", "config.experts is many; it takes arguments of Experts"),
        ("CONFIG", "latent_attention: true", "latent_attention is true; it takes arguments of LatentAttention"),
        ("MODULE", "lora: 4", r"model.init_args.lora is 4; it takes arguments of LoRA: .* Write lora: {rank: ...}"),
        ("STRATEGY", "kernels: flash", "kernels is flash; it takes arguments of Kernels: .*attention, "),
        ("STRATEGY", "checkpointing: 4", "checkpointing is 4; it takes arguments of Checkpointing"),
    ],
)
def test_a_value_in_place_of_arguments(place, line, told, tmp_path):
    run = RUN
    for each in ("STRATEGY", "MODULE", "CONFIG"):
        run = run.replace(each, line if each == place else {"STRATEGY": "tp: 1", "MODULE": "loss_reduction: token",
                                                           "CONFIG": "hidden_size: 8"}[each])  # fmt: skip
    (tmp_path / "run.yaml").write_text(run)
    (fault,) = find_faults(["--config", str(tmp_path / "run.yaml")])
    assert re.search(rf"run.yaml:\d: .*{told}", fault), fault


@pytest.mark.parametrize("name", ["trainer", "model.init_args", "trainer.strategy.init_args"])
def test_a_number_in_place_of_all_arguments(name, tmp_path):
    run = yaml.safe_load(RUN.replace("STRATEGY", "").replace("MODULE, ", "").replace("CONFIG", ""))
    *above, last = name.split(".")
    functools.reduce(dict.__getitem__, above, run)[last] = 4
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert any(
        f"{name} is 4; it takes arguments of" in fault
        for fault in find_faults(["--config", str(tmp_path / "run.yaml")])
    )


def test_values_that_stand_for_arguments(tmp_path):
    (tmp_path / "lora.yaml").write_text("rank: 4")
    (fault,) = find_faults(["--model", "GPTModule", "--model.lora", "4"])
    assert fault == "--model.lora is 4; it takes arguments of LoRA: rank, " + fault.partition("rank, ")[2]
    assert fault.endswith("Write --model.lora.rank=...")
    for value in ("null", "", "LoRA", "lightning_megatron.LoRA", "{rank: 4}", str(tmp_path / "lora.yaml")):
        assert not find_faults(["--model", "GPTModule", f"--model.lora={value}"])
