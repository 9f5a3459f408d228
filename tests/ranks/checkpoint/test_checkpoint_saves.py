"""What a save leaves, in whatever moment: retention, links, what fails, and what is written beside training."""

import os
import pickle
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_megatron import Checkpointing
from lightning_megatron.checkpoint import manifest, newest, save_plan, shard_files
from lightning_megatron.checkpoint.manifest import UNFINISHED
from tests.reference.parallel_gpt import LoadedGPT
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_ranks
from tests.support.small_gpt import SMALL, fit, save, stock_tensors, validation_data
from tests.support.trainer import trainer


def _retention(folder, asynchronous, save_last):
    callback = ModelCheckpoint(
        folder, monitor="train_loss", save_top_k=2, every_n_train_steps=1, save_last=save_last, filename="{step}"
    )
    run, _ = fit(
        Layout(dp=2), 5, callbacks=[callback], strategy={"checkpointing": Checkpointing(async_save=asynchronous)}
    )
    torch.distributed.barrier()  # the first rank links and removes
    names = sorted(path.name for path in Path(folder).iterdir())
    best = callback.best_model_path
    resumed, _ = fit(Layout(dp=2), 6, load="last", callbacks=[ModelCheckpoint(folder, save_last=True)])
    return names, Path(best).name, resumed.global_step, [manifest.read(Path(folder) / n)["global_step"] for n in names]


@pytest.mark.parametrize(("asynchronous", "save_last"), [(False, True), (True, True), (False, "link"), (True, "link")])
def test_top_k_and_last(tmp_path, asynchronous, save_last):
    names, best, step, steps = run_ranks(2, _retention, str(tmp_path), asynchronous, save_last)[0]
    assert names[0] == "last.ckpt"
    assert len(names) == 3
    assert best in names
    assert step == 6
    assert steps[0] == 5
    assert UNFINISHED not in names


def _kept_until_whole(folder):
    """The second save is held up, while the first is due to be removed."""
    folder, go, write, seen = Path(folder), threading.Event(), shard_files.write, []

    class Look(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1:
                trainer.strategy.checkpointer.wait()
                shard_files.write = lambda *a: (go.wait(20), write(*a))[1]
            elif trainer.global_step == 2:
                seen.append(sorted(path.name for path in folder.glob("*.ckpt")))
                go.set()

    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, filename="{step}")
    fit(steps=3, callbacks=[Look(), keep], strategy={"checkpointing": Checkpointing(async_save=True)})
    return seen, sorted(path.name for path in folder.glob("*.ckpt"))


def test_the_last_good_one_stays_until_the_new_one_is_whole(tmp_path):
    assert run_ranks(1, _kept_until_whole, str(tmp_path)) == [([["step=1.ckpt"]], ["step=3.ckpt"])]


def _linked(folder, asynchronous):
    """What ``last.ckpt`` names while the second save is held up, and after the removal of the first."""
    folder, go, write, seen = Path(folder), threading.Event(), shard_files.write, []

    class Look(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1:
                trainer.strategy.checkpointer.wait()
                if asynchronous:
                    shard_files.write = lambda *a: (go.wait(20), write(*a))[1]
            elif trainer.global_step == 2:
                seen.append(manifest.read(folder / "last.ckpt")["global_step"])
                go.set()

    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, save_last="link", filename="{step}")
    fit(steps=3, callbacks=[Look(), keep], strategy={"checkpointing": Checkpointing(async_save=asynchronous)})
    pickle.dumps(keep._link_checkpoint)  # a launcher hands callbacks back
    return seen, os.readlink(folder / "last.ckpt"), sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_link_names_a_whole_checkpoint_at_all_times(tmp_path, asynchronous):
    seen, target, names = run_ranks(1, _linked, str(tmp_path), asynchronous)[0]
    assert seen == [1 if asynchronous else 2]
    assert (target, names) == ("step=3.ckpt", ["last.ckpt", "step=3.ckpt"])


def test_a_link_to_what_is_removed_names_the_next_newest(tmp_path):
    run_ranks(1, save, Layout(), tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    (tmp_path / "last.ckpt").symlink_to("new")
    manifest.remove(tmp_path / "new")
    assert os.readlink(tmp_path / "last.ckpt") == "old"
    manifest.make_link(tmp_path / "old", tmp_path / "last.ckpt")  # a directory is in the link's place
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "old"]


def _saved_twice(folder, change):
    """Two saves at one step; in between the weights are changed, or not."""
    folder, written, write = Path(folder), [], shard_files.write
    shard_files.write = lambda *a: (written.append(a[1].parent.name), write(*a))[1]

    class Twice(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")
            if change:
                next(module.parameters()).data.add_(1)
            trainer.save_checkpoint(folder / f"{trainer.global_step}-again.ckpt")

    fit(Layout(dp=2), 2, callbacks=[Twice()], strategy={"checkpointing": Checkpointing(async_save=True)})
    names = ["1.ckpt", "1-again.ckpt", "2.ckpt", "2-again.ckpt"]
    files = [folder / name / f"weights/__{os.environ['RANK']}_0.distcp" for name in names]
    damaged = [
        manifest.find_damage(folder / n, manifest.read(folder / n), [*manifest.read(folder / n)["files"]], True)
        for n in names
    ]
    assert damaged == [[]] * 4
    return written, [file.stat().st_nlink for file in files], [file.read_bytes() for file in files]


@pytest.mark.parametrize("change", [False, True])
def test_what_was_just_written_is_not_written_again(tmp_path, change):
    for written, links, (one, again, _, _) in run_ranks(2, _saved_twice, str(tmp_path), change):
        assert len(written) == (4 if change else 2)
        assert links == [1 if change else 2] * 4
        assert change or one == again


def _planned(folder):
    plans, plan = [], save_plan.Planner.plan
    save_plan.Planner.plan = lambda *a: (plans.append(1), plan(*a))[1]
    seen = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, *_):
            optimizer = trainer.strategy.optimizers[0]
            if trainer.global_step == 3:  # as a load does it
                for state in optimizer.state.values():
                    state["exp_avg"] = state["exp_avg"].clone().fill_(7)
            trainer.save_checkpoint(f"{folder}/{trainer.global_step}.ckpt")
            seen.append(len(plans))

    fit(Layout(dp=2), 4, callbacks=[Keep()], strategy={"checkpointing": Checkpointing(async_save=True)})
    return seen


def test_a_save_is_planned_once_and_again_when_tensors_are_others(tmp_path):
    assert run_ranks(2, _planned, str(tmp_path)) == [[1, 1, 2, 2]] * 2
    moments = run_ranks(1, stock_tensors, tmp_path / "3.ckpt")[0]["optimizer.exp_avg.decoder.final_layernorm.weight"]
    assert torch.equal(moments, torch.full_like(moments, 7))


def test_a_plan_that_was_not_made_is_not_kept():
    planner, one, other = save_plan.Planner(), torch.zeros(2), torch.zeros(2)
    planner.knows([("weight", one)])
    planner.last = save_plan.Plan([], None)
    assert planner.knows([("weight", one)])
    assert not planner.knows([("weight", other)])
    assert not planner.knows([("weight", other)]), "the save before it has failed"


def _after_the_run(path):
    run, _ = fit(steps=1, strategy={"checkpointing": Checkpointing(async_save=True)})
    run.save_checkpoint(path)
    return manifest.read(Path(path))["global_step"]


def test_a_save_after_the_run_is_whole_at_once(tmp_path):
    assert run_ranks(1, _after_the_run, str(tmp_path / "after.ckpt")) == [1]


class Unsavable(Callback):
    def state_dict(self):
        return {"function": lambda: 0}


def _cannot(folder, on_save_error):
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
    run, _ = fit(
        Layout(dp=2),
        2,
        callbacks=[Unsavable(), keep],
        strategy={"checkpointing": Checkpointing(on_save_error=on_save_error)},
    )
    return run.global_step


def test_what_only_the_first_rank_cannot_save_stops_all_ranks(tmp_path):
    with pytest.raises(RankError, match="Unsavable.* of the checkpoint cannot be saved") as error:
        run_ranks(2, _cannot, str(tmp_path), "raise", timeout=60)
    assert str(error.value).count("CheckpointError: callbacks.Unsavable") >= 2
    assert run_ranks(2, _cannot, str(tmp_path), "warn", timeout=60) == [2, 2]


def _versions(folder):
    for _ in range(2):
        fit(steps=1, callbacks=[ModelCheckpoint(folder, filename="one", every_n_train_steps=1)])
    return sorted(path.name for path in Path(folder).iterdir())


def test_the_version_counter_and_weights_alone(tmp_path):
    assert run_ranks(1, _versions, str(tmp_path)) == [["one-v1.ckpt", "one.ckpt"]]


def _in_flight(folder, asynchronous):
    """Nothing is visible before somebody waits for it."""
    folder, go, write = Path(folder), threading.Event(), shard_files.write

    class HoldUp(Callback):
        def on_train_start(self, trainer, *_):
            checkpointer, wait = trainer.strategy.checkpointer, trainer.strategy.checkpointer.wait
            checkpointer.wait = lambda: (go.set(), wait(), go.clear())[1]
            if asynchronous:
                shard_files.write = lambda *a: (go.wait(20), write(*a))[1]

    one = {"filename": "one", "every_n_train_steps": 1, "save_top_k": -1}
    keep = [ModelCheckpoint(folder, **one), ModelCheckpoint(folder, monitor="train_loss", **one)]
    fit(steps=2, callbacks=[HoldUp(), *keep], strategy={"checkpointing": Checkpointing(async_save=asynchronous)})
    assert not any("file_exists" in vars(callback) for callback in keep)  # they are as they were
    return sorted((path.name, manifest.read(path)["global_step"]) for path in folder.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_name_in_flight_is_not_given_again(tmp_path, asynchronous):
    names = run_ranks(1, _in_flight, str(tmp_path), asynchronous)[0]
    assert names == [("one-v1.ckpt", 1), ("one-v2.ckpt", 2), ("one.ckpt", 2)]  # as Lightning's own


def _one_save_fails(folder, asynchronous, monitor):
    """The third of five finds a file where its directory should be."""
    folder, seen = Path(folder), []
    k = 2 if monitor else 1
    keep = ModelCheckpoint(folder, monitor=monitor, every_n_train_steps=1, save_top_k=k, filename="{step}")

    class Block(Callback):
        def on_train_batch_start(self, trainer, *_):
            trainer.strategy.checkpointer.wait()
            names = [keep.best_model_path, *keep.best_k_models] if keep.best_model_path else []
            assert all(Path(name).exists() for name in names)
            seen.append((sorted(path.name for path in folder.glob("*.ckpt")), len(keep.best_k_models)))
            if trainer.global_step == 2:
                (folder / UNFINISHED).write_text("in the way")
            elif trainer.global_step == 3:
                (folder / UNFINISHED).unlink()

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        strategy = {"checkpointing": Checkpointing(on_save_error="warn", async_save=asynchronous)}
        run, _ = fit(Layout(), 5, callbacks=[Block(), keep], strategy=strategy)
    told = [str(warning.message) for warning in told if "is kept" in str(warning.message)]
    run.validate(LoadedGPT(SMALL), validation_data(), ckpt_path="best", verbose=False)
    return seen, told, Path(keep.best_model_path).name


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_failed_has_no_place_among_the_best(tmp_path, asynchronous):
    seen, told, best = run_ranks(1, _one_save_fails, str(tmp_path / "a"), asynchronous, "train_loss")[0]
    first, both, later = ["step=1.ckpt"], ["step=1.ckpt", "step=2.ckpt"], ["step=2.ckpt", "step=4.ckpt"]
    assert seen == [([], 0), (first, 1), (both, 2), (both, 2), (later, 2)]
    assert [line.split(":")[0].rsplit("/")[-1] for line in told] == ["step=1.ckpt is kept"]
    assert best == "step=5.ckpt"
    seen, told, best = run_ranks(1, _one_save_fails, str(tmp_path / "b"), asynchronous, None)[0]
    assert [names for names, _ in seen] == [[], first, ["step=2.ckpt"], ["step=2.ckpt"], ["step=4.ckpt"]]
    assert best == "step=5.ckpt"


def _failed_behind_the_next(folder):
    """The third save fails beside training, and the fourth finds out."""

    def broken(*args):
        if args[1].parent.name == "step=3.ckpt":
            raise OSError(28, "No space left on device")
        return write(*args)

    write, shard_files.write, folder = shard_files.write, broken, Path(folder)
    options = {"monitor": "train_loss", "every_n_train_steps": 1, "save_top_k": 2, "filename": "{step}"}
    keep = ModelCheckpoint(folder, **options)
    fit(
        Layout(dp=2),
        4,
        callbacks=[keep],
        strategy={"checkpointing": Checkpointing(on_save_error="warn", async_save=True)},
    )
    after = ModelCheckpoint(folder, **options)
    fit(Layout(dp=2), 4, load=folder / "step=4.ckpt", callbacks=[after])
    return [sorted(Path(name).name for name in callback.best_k_models) for callback in (keep, after)]


def test_what_failed_is_not_in_the_next_checkpoint_s_list(tmp_path):
    for run, resumed in run_ranks(2, _failed_behind_the_next, str(tmp_path)):
        assert run == resumed == sorted(path.name for path in tmp_path.glob("*.ckpt"))
        assert "step=3.ckpt" not in run


def _leftovers(folder):
    folder = Path(folder)
    callback = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)
    fit(steps=2, callbacks=[callback])
    killed = manifest.staging_folder(folder / "last.ckpt")
    (killed / "weights").mkdir(parents=True)
    (killed / "weights" / "__0_0.distcp").write_bytes(b"half")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run, _ = fit(steps=3, load="last", callbacks=[ModelCheckpoint(folder, save_top_k=0)])
    assert any("a killed save left last.ckpt. It is skipped" in str(w.message) for w in seen)
    assert killed.exists()
    run.save_checkpoint(folder / "next.ckpt")
    assert not killed.exists()
    # A `last` that is damaged is passed over, too.
    (folder / "last.ckpt" / "manifest.json").unlink()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run, _ = fit(steps=4, load="last", callbacks=[ModelCheckpoint(folder, save_top_k=0)])
    assert any("the newest complete checkpoint in its folder is" in str(w.message) for w in seen)
    assert newest(folder) == folder / "next.ckpt"
    return run.global_step


def test_what_a_killed_save_left_is_skipped_and_cleaned(tmp_path):
    assert run_ranks(1, _leftovers, str(tmp_path)) == [4]


def _failing(folder, asynchronous, on_save_error):
    """The second save finds a file where its directory should be."""
    folder = Path(folder)
    callback = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, filename="{step}")

    class Block(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1 and trainer.is_global_zero:
                trainer.strategy.checkpointer.wait()
                (folder / UNFINISHED).write_text("in the way")

    strategy = {"checkpointing": Checkpointing(async_save=asynchronous, on_save_error=on_save_error)}
    run, _ = fit(Layout(), 3, callbacks=[Block(), callback], strategy=strategy)
    return run.global_step, newest(folder).name


def test_a_save_that_fails_leaves_the_earlier_checkpoint(tmp_path):
    with pytest.raises(RankError, match="Nothing can be saved to .*step=2.ckpt"):
        run_ranks(1, _failing, str(tmp_path / "a"), False, "raise")
    assert newest(tmp_path / "a").name == "step=1.ckpt"
    assert run_ranks(1, _failing, str(tmp_path / "b"), False, "warn") == [(3, "step=1.ckpt")]
    assert run_ranks(1, _failing, str(tmp_path / "c"), True, "warn") == [(3, "step=1.ckpt")]


def _background_failure(folder):
    """The disk breaks on one rank while training goes on."""

    def broken(*_):
        if int(os.environ["RANK"]) == 1:
            raise OSError(28, "No space left on device")
        return write(*_)

    write, shard_files.write = shard_files.write, broken
    callback = ModelCheckpoint(folder, every_n_train_steps=1, filename="{step}")
    try:
        fit(Layout(dp=2), 4, callbacks=[callback], strategy={"checkpointing": Checkpointing(async_save=True)})
    finally:
        shard_files.write = write


def test_a_failure_in_the_background_reaches_all_ranks(tmp_path):
    with pytest.raises(RankError, match="Rank 1 failed: OSError: .Errno 28. No space left") as error:
        run_ranks(2, _background_failure, str(tmp_path))
    assert str(error.value).count("was not saved; earlier checkpoints are as they were") >= 2
    assert newest(tmp_path) is None
    assert not (tmp_path / UNFINISHED).exists()


def _asynchronous(folder, layout):
    weights_at = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            trainer.save_checkpoint(f"{folder}/{trainer.global_step}.ckpt")
            weights_at[trainer.global_step] = {n: p.detach().clone() for n, p in module.named_parameters()}

    fit(layout, 4, callbacks=[Keep()], strategy={"checkpointing": Checkpointing(async_save=True)})
    for step in (1, 4):
        module = LoadedGPT(SMALL)
        trainer(layout).validate(module, validation_data(), ckpt_path=f"{folder}/{step}.ckpt", verbose=False)
        for name, value in module.named_parameters():
            rows = 61 if "embed" in name and value.size(0) == 64 else None
            assert torch.equal(value[:rows], weights_at[step][name][:rows]), (step, name)


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(pp=2, sharded=False)], ids=str)
def test_the_background_writes_what_was_there_when_it_was_asked(tmp_path, layout):
    run_ranks(2, _asynchronous, str(tmp_path), layout)
