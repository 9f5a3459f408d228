"""The private names of Lightning and torch that this package leans on: fails when a release changes them."""

import ast
import copy
import inspect
import multiprocessing.forkserver
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.strategies.launchers.multiprocessing import _check_missing_main_guard
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    LambdaCallback,
    ModelCheckpoint,
    ModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot, _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.call import (
    _call_and_handle_interrupt,
    _call_callback_hooks,
    _call_lightning_module_hook,
)
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector
from lightning.pytorch.trainer.connectors.logger_connector.fx_validator import _FxValidator
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_summary import LayerSummary
from lightning.pytorch.utilities.model_summary import ModelSummary as Summary
from megatron.core import parallel_state
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_megatron.distributed import lightning_private
from tests.support.pages import ROOT
from tests.support.trainer import QUIET


def test_closure_takes_the_three_functions():
    assert list(inspect.signature(Closure.__init__).parameters) == ["self", "step_fn", "backward_fn", "zero_grad_fn"]


def test_optimization_makes_the_closure_and_steps():
    assert list(inspect.signature(_AutomaticOptimization._make_closure).parameters)[1:] == [
        "kwargs",
        "optimizer",
        "batch_idx",
    ]
    assert list(inspect.signature(_AutomaticOptimization._optimizer_step).parameters)[1:] == [
        "batch_idx",
        "train_step_and_backward_closure",
    ]


def test_the_epoch_loop_steps_schedulers():
    assert list(inspect.signature(_TrainingEpochLoop.update_lr_schedulers).parameters)[1:] == [
        "interval",
        "update_plateau_schedulers",
    ]


def test_what_a_resume_leans_on():
    assert {"fetched", "iterator", "batches", "length"} <= vars(_PrefetchDataFetcher()).keys()
    fetcher = _PrefetchDataFetcher()
    fetcher.setup(CombinedLoader([[1], [2]], "max_size_cycle"))
    _DataFetcher.__iter__(fetcher)
    assert not fetcher.batches
    assert [next(part) for part in fetcher.combined_loader._iterator.iterators] == [1, 2]
    assert fetcher.combined_loader._mode == "max_size_cycle"
    loop = _FitLoop(Trainer(logger=False))
    assert (loop._combined_loader, loop._last_train_dl_reload_epoch) == (None, float("-inf"))
    assert callable(_FitLoop._load_combined_loader_states)
    assert list(inspect.signature(_TrainingEpochLoop.advance).parameters)[1:] == ["data_fetcher"]
    assert list(inspect.signature(_TrainingEpochLoop.on_advance_end).parameters)[1:] == ["data_fetcher"]
    progress = _FitLoop(Trainer(logger=False)).state_dict()
    assert {"epoch_progress", "epoch_loop.batch_progress", "state_dict"} <= progress.keys()
    assert set(progress["epoch_progress"]["current"]) == {"ready", "started", "processed", "completed"}
    assert callable(_SignalConnector._slurm_sigusr_handler_fn)


def test_stores_can_be_cloned():
    assert callable(dist.Store.clone if hasattr(dist.Store, "clone") else dist.TCPStore.clone)


def test_process_groups_and_their_store():
    assert callable(dist.distributed_c10d._get_default_store)
    assert isinstance(dist.distributed_c10d._world.pg_map, dict)
    assert hasattr(parallel_state, "_global_process_group_list")


def test_what_the_launchers_are_made_of():
    def names(function):
        return list(inspect.signature(function).parameters)

    assert names(_SubprocessScriptLauncher.__init__) == ["self", "cluster_environment", "num_processes", "num_nodes"]
    assert names(_MultiProcessingLauncher.__init__) == ["self", "strategy", "start_method"]
    assert names(_call_and_handle_interrupt)[:2] == ["trainer", "trainer_fn"]
    assert names(_set_num_threads_if_needed) == ["num_processes"]
    assert names(_check_missing_main_guard) == []
    assert _IS_INTERACTIVE is False
    _GlobalStateSnapshot.capture().restore()


def test_the_forkserver_says_what_it_preloads():
    assert multiprocessing.forkserver.ForkServer()._preload_modules == ["__main__"]


def test_where_a_loop_keeps_that_it_resumes():
    loop = Trainer(accelerator="cpu", **QUIET).fit_loop
    loop.load_state_dict(loop.state_dict())
    assert loop._combined_loader_states_to_load == []
    assert isinstance(type(loop).restarting, property)
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        assert part._loaded_from_state_dict is True
        assert part._resuming_from_checkpoint is True
    assert loop.epoch_loop.automatic_optimization.optim_progress is not None


def test_where_refusals_look():
    assert ParallelStrategy.__init__.__code__.co_names.count("_layer_sync") == 1
    assert TensorBoardLogger(".", log_graph=True)._log_graph


def test_a_checkpoint_callback_makes_its_links_by_a_method_of_its_own():
    assert list(inspect.signature(ModelCheckpoint._link_checkpoint).parameters) == ["trainer", "filepath", "linkpath"]
    assert "self._link_checkpoint(trainer, " in inspect.getsource(ModelCheckpoint._save_last_checkpoint)
    assert list(inspect.signature(ModelCheckpoint.file_exists).parameters) == ["self", "filepath", "trainer"]
    assert "self.file_exists(" in inspect.getsource(ModelCheckpoint._get_metric_interpolated_filepath_name)


class _Named(Profiler):
    def __init__(self) -> None:
        super().__init__()
        self.actions: list[str] = []

    def start(self, action_name: str) -> None:
        self.actions.append(action_name)

    def stop(self, action_name: str) -> None:
        pass


def test_hooks_are_told_to_the_profiler_and_know_whether_they_may_log():
    profiler = _Named()
    trainer = Trainer(profiler=profiler, callbacks=[LambdaCallback()], **QUIET)
    trainer.strategy._lightning_module = module = LightningModule()
    _call_callback_hooks(trainer, "on_train_epoch_end")
    _call_lightning_module_hook(trainer, "on_train_epoch_end")
    assert f"[Callback]{LambdaCallback().state_key}.on_train_epoch_end" in profiler.actions
    assert profiler.actions[-1] == f"[LightningModule]{type(module).__name__}.on_train_epoch_end"
    assert _FxValidator.functions["on_train_epoch_end"] is not None
    assert _FxValidator.functions["on_save_checkpoint"] is None


def test_loaders_get_their_samplers_by_one_method():
    assert list(inspect.signature(_DataConnector._resolve_sampler).parameters) == [
        "self",
        "dataloader",
        "shuffle",
        "mode",
    ]
    assert "datamodule" in inspect.signature(_DataConnector.attach_data).parameters
    assert list(inspect.signature(_DataConnector._prepare_dataloader).parameters) == [
        "self",
        "dataloader",
        "shuffle",
        "mode",
    ]
    assert "dataloader" in inspect.signature(_DataConnector._requires_distributed_sampler).parameters
    assert "_batch_sampler" in vars(_IndexBatchSamplerWrapper(BatchSampler([1], 1, False)))


# Names of other libraries, which stand in the files that lean on them, and say so there.
OTHERS = {
    "torch": {"_C", "_apply", "_buffers", "_get_closed_form_lr", "_get_default_store", "_iterator", "_last_lr",
              "_cdata", "_non_persistent_buffers_set", "_version", "_world", "_parameters", "_modules",
              "_backward_hooks", "_forward_hooks", "_post_accumulate_grad_hooks", "_step_supports_amp_scaling",
              "_current_graph_task_id", "_grouped_mm", "_materialize", "_scaled_dot_product_efficient_attention",
              "_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_flash_attention",
              "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_flash_attention_for_cpu",
              "_scaled_dot_product_flash_attention_for_cpu_backward"},
    "megatron-core": {"_forward_attention", "_forward_impl", "_get_model_param_range_map",
                      "_global_process_group_list", "_preprocess", "_build_sample_index",
                      "_relative_position_bucket"},
    "Python": {"_actions", "_asdict", "_clear", "_current_frames", "_exit", "_forkserver", "_option_string_actions",
               "_preload_modules", "_replace", "_run_exitfuncs", "_SubParsersAction"},
    "datasets": {"_fingerprint"},
    "transformers": {"_adjust_missing_and_unexpected_keys", "_experts_implementation"},
}  # fmt: skip
# Lightning calls them, or sets them, on classes that inherit from its own: see the module's docstring.
OVERRIDDEN = {"_configure_launcher", "_precision_plugin", "_run_subcommand", "_optimizers"}


def _own_names(trees: dict[str, ast.Module]) -> set[str]:
    """Names that begin with an underscore and that this package defines: functions, classes, variables, attributes."""
    found: set[str] = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name(id="self")):
                found.add(name)
    return found


def test_no_other_file_leans_on_a_private_name_of_lightning_or_torchmetrics():
    folder = ROOT / "lightning_megatron"
    trees = {str(file.relative_to(folder)): ast.parse(file.read_text()) for file in folder.rglob("*.py")}
    homes = [
        trees.pop(f"{name}.py") for name in ("distributed/lightning_private", "strategy/logging/torchmetrics_private")
    ]
    own, others = _own_names(trees), OVERRIDDEN.union(*OTHERS.values())
    theirs = {node.attr for home in homes for node in ast.walk(home) if isinstance(node, ast.Attribute)}
    leaks = set()
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                is_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if node.attr not in (own if is_self else own - theirs) | others:
                    leaks.add(f"{file}:{node.lineno} {node.attr}")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
                leaks |= {f"{file}:{node.lineno} {each.name}" for each in node.names if each.name.startswith("_")}
    assert not leaks


def test_connectors():
    trainer = Trainer(accelerator="cpu", **QUIET)
    connector = lightning_private.data_connector(trainer)
    assert callable(getattr(connector, lightning_private.RESOLVE_SAMPLER))
    loader = DataLoader([1, 2])
    assert lightning_private.requires_distributed_sampler(trainer, loader) is False
    assert lightning_private.resolve_sampler(trainer, loader, False, None) is loader.sampler
    assert lightning_private.handler_before(trainer, 15) is None
    assert trainer.received_sigterm is False
    lightning_private.note_sigterm(trainer)
    assert trainer.received_sigterm is True
    assert list(inspect.signature(_SignalConnector._slurm_sigusr_handler_fn).parameters) == ["self", "signum", "_"]
    assert lightning_private.call_and_handle_interrupt(trainer, lambda: 3) == 3


def test_loops():
    trainer = Trainer(accelerator="cpu", accumulate_grad_batches=2, **QUIET)
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    trainer.fit_loop.max_batches = 9
    progress.ready = 1
    assert not lightning_private.ends_accumulation(trainer)
    progress.ready = 2
    assert lightning_private.ends_accumulation(trainer)
    assert lightning_private.skips_backward(trainer) is False
    trainer.training = True
    assert lightning_private.active_loop(trainer) is trainer.fit_loop
    trainer.state.fn = TrainerFn.VALIDATING
    assert lightning_private.evaluation_loop(trainer) is trainer.validate_loop
    before = trainer.fit_loop.epoch_loop._batches_that_stepped
    lightning_private.uncount_logged_step(trainer)
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == before - 1
    lightning_private.set_last_reload_epoch(trainer, 3)
    assert lightning_private.last_reload_epoch(trainer) == 3
    lightning_private.end_restart(trainer)
    assert trainer.fit_loop.restarting is False
    assert lightning_private.predictions(trainer) == []
    assert lightning_private.data_fetcher(trainer) is None
    assert list(inspect.signature(_TrainingEpochLoop._should_check_val_fx).parameters) == ["self", "data_fetcher"]
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        assert loop.inference_mode is True


def test_a_loop_that_ran_does_not_count_as_one_that_resumes():
    loop = Trainer(accelerator="cpu", **QUIET).fit_loop
    loop.load_state_dict(loop.state_dict())
    loop._restarting = True
    assert loop.is_resuming
    lightning_private.forget_restart(loop)
    assert not loop.restarting
    assert not loop.is_resuming


def test_loaders_and_fetchers():
    loop = Trainer(accelerator="cpu", **QUIET).fit_loop
    assert lightning_private.combined_loader(loop) is None
    combined = CombinedLoader([[1], [2]], "max_size_cycle")
    lightning_private.set_combined_loader(loop, combined)
    assert lightning_private.combined_loader(loop) is combined
    assert lightning_private.combining_mode(combined) == "max_size_cycle"
    lightning_private.load_loader_states(loop.trainer, [])
    assert loop._combined_loader_states_to_load == []
    fetcher = _PrefetchDataFetcher()
    fetcher.setup(CombinedLoader([[1, 3], [2, 4]], "max_size_cycle"))
    assert [next(each) for each in lightning_private.start_fetcher(fetcher)] == [1, 2]
    lightning_private.fetch_ahead(fetcher)
    assert [batch for batch, _, _ in fetcher.batches] == [[3, 4]]
    inner = BatchSampler([1], 1, False)
    wrapper = lightning_private.IndexBatchSamplerWrapper(inner)
    assert lightning_private.copy_inner_batch_sampler(wrapper, copy.copy) is not inner
    assert list(lightning_private.DatasetSamplerWrapper(SequentialSampler([7, 7]))) == [0, 1]


def test_logging():
    trainer, module = Trainer(accelerator="cpu", **QUIET), LightningModule()
    assert lightning_private.results(trainer) is None
    trainer.training = True
    assert lightning_private.results(trainer) is trainer.fit_loop.epoch_loop._results
    assert lightning_private.logs_every_step(trainer, "loss") is False
    with lightning_private.logging_in(module, "training_step"):
        assert module._current_fx_name == "training_step"
    assert module._current_fx_name is None
    assert "_current_fx_name" in inspect.getsource(LightningModule.log)
    assert lightning_private.may_log("on_train_epoch_end")
    assert not lightning_private.may_log("on_save_checkpoint")
    assert lightning_private.draws_graph(TensorBoardLogger(".", log_graph=True))


def test_callbacks():
    summary = ModelSummary(max_depth=3)
    assert callable(getattr(summary, lightning_private.SUMMARY))
    assert lightning_private.summary_depth(summary) == 3
    text = lightning_private.text_of_summary(3, 2, 1.0, {"train": 1, "eval": 0}, 0, [("Name", ["a"]), ("Type", ["b"])])
    assert text.splitlines()[-1].endswith("Total Flops")
    assert callable(getattr(RichProgressBar(), lightning_private.TRAIN_DESCRIPTION))
    module, layer = LightningModule(), torch.nn.Linear(1, 1)
    assert lightning_private.summarized_module(Summary(module)) is module
    assert lightning_private.layer_of(LayerSummary(layer)) is layer
    keep = ModelCheckpoint()
    assert callable(getattr(keep, lightning_private.LINK_CHECKPOINT))
    assert lightning_private.last_saved_step(keep) == 0
    assert lightning_private.bar_is_due(TQDMProgressBar(refresh_rate=2), 4, 9)
    assert list(inspect.signature(RichProgressBar._update).parameters)[1:3] == ["progress_bar_id", "current"]
    assert list(inspect.signature(RichProgressBar._update_metrics).parameters)[1:] == ["trainer", "pl_module"]


def test_strategies_and_launchers():
    strategy = SingleDeviceStrategy("cpu")
    lightning_private.set_launcher(strategy, "a launcher")
    assert strategy.launcher == "a launcher"
    assert lightning_private.checkpoint_io(strategy) is None
    assert not lightning_private.converts_batch_norms(DDPStrategy())
    assert lightning_private.strategy_of(lightning_private.MultiProcessingLauncher(strategy)) is strategy
    assert "_configure_launcher" in vars(DDPStrategy)
    assert "_run_subcommand" in vars(LightningCLI)
    assert strategy._precision_plugin is None
    assert list(lightning_private.convert_floats([torch.ones(1)], torch.float64)[0].shape) == [1]
    with lightning_private.DefaultDtype(torch.float64):
        assert torch.ones(1).dtype == torch.float64
    names = inspect.signature(lightning_private.start_process_group).parameters
    assert list(names)[:2] == ["cluster_environment", "torch_distributed_backend"]
    assert list(inspect.signature(lightning_private.reduce).parameters) == ["result", "group", "reduce_op"]
    assert list(inspect.signature(lightning_private.optimizers_to_device).parameters) == ["optimizers", "device"]
    assert lightning_private.is_interactive() is False


def test_configure_optimizers_may_return_none():
    class Module(LightningModule):
        def configure_optimizers(self):
            return None

    module = Module()
    module.trainer = Trainer(accelerator="cpu", **QUIET)
    with pytest.warns(UserWarning, match="returned `None`"):
        optimizers, _ = _init_optimizers_and_lr_schedulers(module)
    assert [lightning_private.is_no_optimizer(each) for each in optimizers] == [True]


# What a run changes in a Trainer's objects and leaves, as its result: see `trainer_patches.py`.
RESULTS = {
    "callbacks/run_end.py": {"should_stop"},
    "checkpoint/model_checkpoint.py": {
        "best_model_path", "best_model_score", "kth_best_model_path", "kth_value", "last_model_path",
    },
    "checkpoint/torch_private.py": {"_iterator"},  # the workers of a copy of the loader
    "strategy/launchers/returned_state.py": {"state"},
    "strategy/logging/torchmetrics_private.py": {"_update_count", "_computed", "_forward_cache"},
    "strategy/preemption.py": {"last_model_path"},
}  # fmt: skip
OBJECTS = {"trainer", "loop", "epoch_loop", "fit_loop", "callback", "logger", "loader", "profiler", "metric"}


def _assigned(tree: ast.Module) -> Iterator[ast.Attribute]:
    """Attributes that a file assigns to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node


def test_no_other_file_replaces_attributes_of_a_trainers_objects():
    folder = ROOT / "lightning_megatron"
    homes = ("distributed/lightning_private.py", "strategy/trainer_patches.py")
    written = set()
    for file in folder.rglob("*.py"):
        name = str(file.relative_to(folder))
        for target in _assigned(ast.parse(file.read_text())) if name not in homes else ():
            owner = {getattr(part, "id", "") or getattr(part, "attr", "") for part in ast.walk(target.value)}
            if owner & OBJECTS and target.attr not in RESULTS.get(name, ()):
                written.add(f"{name}:{target.lineno} {target.attr}")
    assert not written
