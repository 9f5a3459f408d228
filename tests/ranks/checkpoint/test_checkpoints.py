"""What a checkpoint is, what is refused, and what is left when a save or a file goes wrong."""

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lightning_megatron import Checkpointing, GPTModule
from lightning_megatron.checkpoint import CheckpointError, manifest, shard_reader
from lightning_megatron.checkpoint.consolidate import export
from lightning_megatron.cli.main import main
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.layout import Layout
from tests.support.plain_module import PlainModule
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.small_gpt import SMALL, fit, save, spoil, stock_tensors, validation_data
from tests.support.trainer import trainer


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of two tensor-parallel ranks, at step 2."""
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    run_in_pool(2, save, Layout(tp=2), path)
    return path


@pytest.fixture
def copy(good, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "copy.ckpt"))


def _load(layout, path, **options):
    run, _ = fit(layout, 3, load=path, **options)
    return run.global_step


# What is in it


def test_each_rank_has_written_its_part_and_the_manifest_names_all(good):
    about = manifest.read(good)
    files = {str(file.relative_to(good)) for file in good.rglob("*") if file.is_file()}
    assert files == {*about["files"], "manifest.json"}
    assert {"weights/__0_0.distcp", "weights/__1_0.distcp", "ranks/00001.pt", "trainer.pt"} <= files
    assert (about["global_step"], about["layout"]["tp"], about["objects"]) == (2, 2, [])
    sizes = [about["files"][f"weights/__{rank}_0.distcp"]["bytes"] for rank in (0, 1)]
    assert max(sizes) < 0.75 * sum(sizes), (
        "what both ranks have (norms, positions) is one's to write, the rest is shared"
    )


def test_megatron_core_itself_reads_it(good):
    tensors = run_ranks(1, stock_tensors, good)[0]
    assert tensors["model.embedding.word_embeddings.weight"].shape == (61, 32)  # without padding
    assert tensors["optimizer.exp_avg.decoder.layers.1.mlp.linear_fc1.weight"].any()
    halves = run_ranks(2, _stock_halves, good)
    whole = tensors["model.decoder.layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(torch.cat([half["first"] for half in halves]), whole)


def _stock_halves(path):
    """``dist_checkpointing.load`` gives each of two ranks its half of a weight."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    key = "model.decoder.layers.0.mlp.linear_fc1.weight"
    half = ShardedTensor.from_rank_offsets(key, torch.empty(64, 32), (0, rank, 2))
    return {"first": dist_checkpointing.load({"first": half}, f"{path}/weights")["first"]}


def _bytes_read(layout, path):
    read = []
    read_data = shard_reader._Reader.read_data

    def counted(self, plan, planner):
        read.append(sum(self.storage_data[item.storage_index].length for item in plan.items))
        return read_data(self, plan, planner)

    shard_reader._Reader.read_data = counted
    _load(layout, path)
    return sum(read)


@pytest.mark.parametrize(("layout", "share"), [(Layout(dp=2, sharded=False), 0.55), (Layout(dp=2), 0.7)], ids=str)
def test_replicas_share_the_reading(good, layout, share):
    """Of one replica's bytes. A flat part of the distributed optimizer cuts through pieces, which are read whole."""
    whole = run_ranks(1, _bytes_read, Layout(), good)[0]
    for part in run_ranks(layout.world_size, _bytes_read, layout, good):
        assert part < share * whole


def _weights_only(path):
    with pytest.raises(KeyError, match="contains only the model"):
        fit(Layout(tp=2), 3, load=path)
    run = trainer(Layout(tp=2))
    return run.validate(LoadedGPT(SMALL), validation_data(), ckpt_path=path, verbose=False)[0]["val_loss"]


def _validate(layout, path):
    return trainer(layout).validate(LoadedGPT(SMALL), validation_data(), ckpt_path=path, verbose=False)[0]["val_loss"]


def test_weights_alone_and_validation(good, tmp_path):
    run_in_pool(2, save, Layout(tp=2), tmp_path / "weights.ckpt", "32-true", True)
    assert not any("optimizer" in key for key in shard_reader.stored(tmp_path / "weights.ckpt" / "weights"))
    loss = run_in_pool(2, _weights_only, tmp_path / "weights.ckpt")[0]
    whole = run_in_pool(2, _validate, Layout(pp=2), good)[0]
    assert loss == pytest.approx(whole, rel=1e-5)
    untrained = run_in_pool(1, _untrained)[0]
    assert abs(untrained - whole) > 1e-3


def _untrained():
    return trainer(Layout()).validate(LoadedGPT(SMALL), validation_data(), verbose=False)[0]["val_loss"]


PRECISIONS = [
    ("32-true", "bf16-mixed"),
    ("bf16-mixed", "32-true"),
    ("bf16-mixed", "bf16-true"),
    ("16-mixed", "32-true"),
    ("bf16-true", "16-mixed"),
]


def _main_weights(layout, path, precision, save):
    run, module = fit(layout, 2, load=None if save else path, precision=precision, loss_scale=256.0)
    if save:
        run.save_checkpoint(path)
    optimizer = run.strategy.optimizers[0]
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        names[id(h.parameter)]: (h.main_param.detach().clone(), optimizer.state[h.main_param]["exp_avg"])
        for h in optimizer.parameter_slices()
    }


@pytest.mark.parametrize(("before", "after"), PRECISIONS)
def test_main_weights_and_moments_come_over_exactly_between_precisions(tmp_path, before, after):
    layout = Layout(tp=2, sharded=False)  # main weights are whole there, and easily compared
    path = tmp_path / "one.ckpt"
    saved = run_in_pool(2, _main_weights, layout, path, before, True)
    loaded = run_in_pool(2, _main_weights, layout, path, after, False)
    for before_rank, after_rank in zip(saved, loaded, strict=True):
        for name, (weight, moment) in before_rank.items():
            real = slice(None) if "embed" not in name else slice(0, 29)  # the second rank's last rows are padding
            assert torch.equal(after_rank[name][0][real], weight[real]), name
            assert torch.equal(after_rank[name][1][real], moment[real]), name


def test_a_plain_process_gets_a_working_module(good):
    loss = run_in_pool(1, _validate, Layout(), good)[0]
    seen = run_ranks(1, _alone, good)[0]
    assert seen["loss"] == pytest.approx(loss, rel=1e-5)
    assert seen["config"] == SMALL
    assert seen["steps"] == 1


def _alone(path):
    module = GPTModule.load_from_checkpoint(path)
    samples = text_samples(SMALL, 8)
    with torch.no_grad():
        logits = module.eval()(tokens=samples["tokens"], labels=samples["labels"])
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), samples["labels"], reduction="none")
    loss = (each * samples["loss_mask"]).sum() / samples["loss_mask"].sum()
    with pytest.raises(CheckpointError, match="decoder.layers.2"):
        GPTModule.load_from_checkpoint(path, config=plain_gpt.replace(SMALL, num_layers=3))
    run = trainer(Layout(), max_steps=1)  # a run afterwards has the process to itself
    run.fit(LoadedGPT(SMALL), validation_data())
    return {"loss": float(loss), "config": module.config, "steps": run.global_step}


def test_export_gives_the_whole_model_in_one_file(good, tmp_path, capsys):
    main(["export", str(good), str(tmp_path / "out.safetensors")])
    assert "out.safetensors" in capsys.readouterr().out
    exported = load_file(tmp_path / "out.safetensors")
    assert set(exported) == set(plain_gpt.initial_weights(SMALL))
    expected = {k: v for k, v in run_ranks(1, stock_tensors, good)[0].items() if k.startswith("model.")}
    for name, value in exported.items():
        assert torch.equal(value, expected[f"model.{name}"]), name
    with pytest.raises(SystemExit, match="none. There is no file or directory of that name"):
        main(["export", str(tmp_path / "none"), str(tmp_path / "out.safetensors")])


def _plain(path):
    module = PlainModule()
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.1)
    rows = Rows({"x": torch.randn(24, 4), "y": torch.randn(24, 1)})
    run = trainer(Layout(dp=2), max_epochs=1)
    run.fit(module, DataLoader(rows, batch_size=4))
    run.save_checkpoint(path)
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_plain_module_exports_to_a_file_that_lightning_loads(tmp_path):
    trained = run_in_pool(2, _plain, tmp_path / "plain.ckpt")[0]
    loaded = PlainModule.load_from_checkpoint(export(tmp_path / "plain.ckpt", tmp_path / "one.ckpt"))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, trained[name])


class Factored(LoadedGPT):
    """Adafactor keeps a row and a column for each matrix."""

    def configure_optimizers(self):
        return torch.optim.Adafactor(self.parameters(), lr=1e-2)


def _factored(layout, path):
    whole, _ = fit(layout, 4, module=Factored(SMALL))
    run, _ = fit(layout, 2, module=Factored(SMALL))
    run.save_checkpoint(path)
    again, _ = fit(layout, 4, load=path, module=Factored(SMALL))
    assert again.global_step == 4
    return [
        torch.equal(one, other)
        for one, other in zip(whole.lightning_module.parameters(), again.lightning_module.parameters(), strict=True)
    ]


def _factored_elsewhere(layout, path):
    run, module = fit(layout, 2, load=path, module=Factored(SMALL))
    states = [run.strategy.optimizers[0].state[parameter] for parameter in module.parameters()]
    return [(tuple(state["row_var"].shape), state["row_var"].sum().item()) for state in states if "row_var" in state]


def test_state_of_another_shape_goes_with_whole_weights(tmp_path):
    for same in run_in_pool(2, _factored, Layout(dp=2, sharded=False), tmp_path / "dp.ckpt"):
        assert all(same)
    rows = run_in_pool(1, _factored_elsewhere, Layout(sharded=False), tmp_path / "dp.ckpt")[0]
    assert (64, 1) in dict(rows)  # the vocabulary's padding has rows, too
    assert all(total > 0 for _, total in rows)
    with pytest.raises(RankError, match="such state cannot be divided. Use tp=1") as error:
        run_ranks(2, _factored, Layout(tp=2, sharded=False), tmp_path / "tp.ckpt")
    assert str(error.value).count("CheckpointError: The optimizer's state") >= 2
    with pytest.raises(RankError, match="dp.ckpt was not loaded. The optimizer's state 'col_var'"):
        run_ranks(2, _factored_elsewhere, Layout(tp=2, sharded=False), tmp_path / "dp.ckpt")


# What is refused


class Untouched(LoadedGPT):
    """Fails if anything was loaded before the error."""

    def load_state_dict(self, *_, **__):
        raise AssertionError("half loaded")


def _load_spoilt(path):
    fit(Layout(tp=2), 3, load=path, module=Untouched(SMALL))


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "manifest", "no manifest"])
def test_damage_is_found_and_the_file_named(copy, how):
    message = spoil(copy, how)
    with pytest.raises(RankError, match=message) as error:
        run_ranks(2, _load_spoilt, copy)
    assert str(error.value).count("CheckpointError") >= 2, "every rank says so"
    assert "half loaded" not in str(error.value)


def _load_unchecked(path):
    fit(
        Layout(tp=2),
        3,
        load=path,
        module=Untouched(SMALL),
        strategy={"checkpointing": Checkpointing(verify_checksums=False)},
    )


@pytest.mark.parametrize("name", ["weights/__1_0.distcp", "weights/.metadata", "trainer.pt", "ranks/00001.pt"])
def test_damage_that_was_not_looked_for_is_an_error_of_all_ranks(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    content[:8] = bytes(8)
    (copy / name).write_bytes(content)
    with pytest.raises(RankError, match="copy.ckpt could not be read.*verify_checksums=True") as error:
        run_ranks(2, _load_unchecked, copy, timeout=60)
    assert str(error.value).count("CheckpointError: ") >= 2
    assert "half loaded" not in str(error.value)


def test_checksums_can_be_left_out(copy):
    file = copy / "trainer.pt"
    about = json.loads((copy / "manifest.json").read_text())["manifest"]
    about["files"]["trainer.pt"]["crc32"] ^= 1
    manifest._write_json(copy / "manifest.json", about)
    assert file.is_file()
    with pytest.raises(RankError, match="its checksum differs"):
        run_ranks(2, _load, Layout(tp=2), copy)
    assert run_in_pool(2, _load_unverified, copy) == [3, 3]


def _load_unverified(path):
    return _load(Layout(tp=2), path, strategy={"checkpointing": Checkpointing(verify_checksums=False)})


def _other_architecture(path, strict):
    config = plain_gpt.replace(SMALL, ffn_hidden_size=64, num_layers=4)
    module = GPTModule(config)
    module.strict_loading = strict
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run = trainer(Layout(tp=2))
        run.validate(module, validation_data(), ckpt_path=path, verbose=False)
    told = [str(w.message) for w in seen if "Not loaded" in str(w.message)]
    return told, module.chunks[0].embedding.position_embeddings.weight.detach()


def test_another_architecture_is_listed_shortest_first_and_the_rest_loads_if_asked(good):
    with pytest.raises(RankError) as error:
        run_ranks(2, _other_architecture, good, True)
    lines = [
        line
        for line in str(error.value).split("another architecture")[1].splitlines()[1:]
        if line.startswith("  model.")
    ]
    assert "  model.decoder.layers.0.mlp.linear_fc1.bias is [64] in the model and [128] in the checkpoint" in lines
    assert [len(line) for line in lines] == sorted(len(line) for line in lines)
    assert any("layers.3" in line and "not in the checkpoint" in line for line in lines)
    told, positions = run_in_pool(2, _other_architecture, good, False)[0]
    assert "linear_fc1.bias is [64]" in told[0]
    assert torch.equal(positions, run_ranks(1, stock_tensors, good)[0]["model.embedding.position_embeddings.weight"])


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/lightning_megatron_was_here",))


class Own:
    """A class of the user's."""


class Stubborn(Callback):
    def state_dict(self):
        return {"object": Own()}

    def load_state_dict(self, state):
        self.loaded = state["object"]


def _objects(path, trust, weights_only=None):
    if not path.exists():
        run, _ = fit(steps=1, callbacks=[Stubborn()])
        run.save_checkpoint(path)
        return None
    callback = Stubborn()
    run = trainer(Layout(), {"checkpointing": Checkpointing(allow_pickle=trust)}, max_steps=2, callbacks=[callback])
    run.fit(LoadedGPT(SMALL), validation_data(), ckpt_path=path, weights_only=weights_only)
    return type(callback.loaded).__name__


def test_objects_load_only_where_they_are_trusted(tmp_path):
    path = tmp_path / "objects.ckpt"
    run_ranks(1, _objects, path, False)
    with pytest.raises(RankError, match="holds objects .callbacks.Stubborn.*allow_pickle=True"):
        run_ranks(1, _objects, path, False)
    assert run_ranks(1, _objects, path, True) == ["Own"]
    with pytest.raises(RankError, match="holds objects .callbacks.Stubborn"):  # Lightning 2.6 does not hand it on
        run_ranks(1, _objects, path, False, False)


@pytest.mark.parametrize("name", ["weights/.metadata", "trainer.pt", "ranks/00000.pt"])
def test_no_code_runs_from_a_checkpoint(copy, name, tmp_path):
    mark = Path("/tmp/lightning_megatron_was_here")
    mark.unlink(missing_ok=True)
    content = pickle.dumps(Evil())
    if name != "weights/.metadata":
        torch.save(Evil(), tmp_path / "evil")
        content = (tmp_path / "evil").read_bytes()
    (copy / name).write_bytes(content)
    about = json.loads((copy / "manifest.json").read_text())["manifest"]
    about["files"][name] = {"bytes": len(content), "crc32": manifest.checksum(copy / name)}
    manifest._write_json(copy / "manifest.json", about)
    with pytest.raises(RankError, match="none of torch's records|Weights only load failed"):
        run_ranks(2, _load, Layout(tp=2), copy)
    assert not mark.exists()


def _remote(path):
    run, _ = fit(steps=1)
    run.save_checkpoint(path)


def test_addresses_of_object_stores_are_refused():
    with pytest.raises(RankError, match="cannot save to or load from 's3://bucket/one.ckpt'"):
        run_ranks(1, _remote, "s3://bucket/one.ckpt")


def _folder_of_another_kind(folder):
    with pytest.raises(MisconfigurationException, match="cannot save to or load from 'memory://kept'"):
        fit(callbacks=[ModelCheckpoint("memory://kept")])
    with pytest.raises(MisconfigurationException, match="a folder named 'file:'. Give the path without file://"):
        fit(callbacks=[ModelCheckpoint(f"file://{folder}")])
    with pytest.raises(MisconfigurationException, match="cannot save to or load from 's3://bucket'"):
        fit(callbacks=[ModelCheckpoint()], default_root_dir="s3://bucket")


def test_folders_of_other_kinds_are_refused_before_the_first_step(tmp_path):
    run_in_pool(1, _folder_of_another_kind, str(tmp_path))


def _near_last(folder):
    fit(steps=1, callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, filename="one")])
    for name in ("last-v1.ckpt", "last.ckpt"):
        (folder / name).mkdir()
        assert fit(steps=2, load=folder / name)[0].global_step == 2
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found: .*last_typo"):
        fit(steps=2, load=folder / "last_typo")


def test_the_newest_is_taken_for_last_and_for_nothing_that_begins_like_it(tmp_path):
    run_in_pool(1, _near_last, tmp_path)
