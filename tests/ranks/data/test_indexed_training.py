"""GPT, BERT and T5 trained from indexed data: alike in every layout, and resumed at the next sample."""

import functools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from lightning_megatron.data import GPTSamples, RampUp, SpanCorruptionCollator
from lightning_megatron.data.indexed.files import files
from tests.reference.parallel_gpt import LoadedGPT
from tests.reference.plain_gpt import GPT2
from tests.support.indexed import MODULES, Seen, make, train, write_all
from tests.support.layout import Layout
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import QUIET, trainer

pytestmark = pytest.mark.usefixtures("preloaded_python")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("indexed")
    write_all(made)
    return str(made)


@functools.cache
def truth(kind: str, folder: str) -> dict:
    (alone,) = run_in_pool(1, train, kind, folder, Layout(), 4)
    return alone


# The band: fp32 sums in another order; losses are near 5.
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("gpt", Layout(tp=2)),
        ("gpt", Layout(pp=2)),
        ("gpt", Layout(dp=2)),
        ("bert", Layout(pp=2)),
        ("bert", Layout(dp=2)),
        ("t5", Layout(tp=2)),
    ],
    ids=str,
)
def test_layouts_train_alike(folder, kind, layout):
    alone = truth(kind, folder)
    assert len(alone["losses"]) == 4
    assert len({tuple(map(tuple, batch)) for batch in alone["batches"]}) == 4
    ranks = run_in_pool(2, train, kind, folder, layout, 4)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert rank["val"] == pytest.approx(alone["val"], rel=1e-5)
        assert rank["test"] == pytest.approx(alone["test"], rel=1e-5)
    if layout.dp == 1:
        assert ranks[0]["batches"] == ranks[1]["batches"] == alone["batches"]
    else:  # the same samples make each global batch
        for step, batch in enumerate(alone["batches"]):
            assert sorted(ranks[0]["batches"][step] + ranks[1]["batches"][step]) == sorted(batch)


def _fit(folder: str, layout: Layout, steps: int, stop: int | None = None, resume: str | None = None, **data) -> dict:
    """A run of ``steps``, that saves and is stopped at ``stop``, or goes on from there."""
    seen = Seen()
    saving = ModelCheckpoint(f"{folder}/saved-{layout}", filename="{step}", every_n_train_steps=stop or 1000)

    class Stop(Seen):
        def on_train_batch_end(self, run, *args):
            run.should_stop = stop is not None and run.global_step >= stop

    run = trainer(
        layout,
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[seen, saving, Stop()],
        enable_checkpointing=True,
        accumulate_grad_batches=data.pop("accumulate", 1),
    )
    run.fit(MODULES["gpt"](), datamodule=make("gpt", folder, **data), ckpt_path=resume)
    return {"losses": seen.losses, "batches": seen.batches, "path": saving.best_model_path, "step": run.global_step}


@pytest.fixture(scope="module")
def uninterrupted(folder):
    return run_in_pool(2, _fit, folder, Layout(dp=2), 8)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(folder, uninterrupted):
    begun = run_in_pool(2, _fit, folder, Layout(dp=2), 8, 3)
    assert [rank["step"] for rank in begun] == [3, 3]
    resumed = run_in_pool(2, _fit, folder, Layout(dp=2), 8, None, begun[0]["path"])
    for rank in range(2):
        assert begun[rank]["losses"] + resumed[rank]["losses"] == uninterrupted[rank]["losses"]
        assert begun[rank]["batches"] + resumed[rank]["batches"] == uninterrupted[rank]["batches"]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=str)
def test_a_run_goes_on_at_the_next_sample_on_other_sizes(folder, uninterrupted, layout):
    """``global_batch_size`` is the same; from two replicas to one."""
    begun = run_in_pool(2, _fit, folder, Layout(dp=2), 8, 3)
    resumed = run_in_pool(layout.world_size, _fit, folder, layout, 8, None, begun[0]["path"])
    for step, batch in enumerate(resumed[0]["batches"], 3):
        both = uninterrupted[0]["batches"][step] + uninterrupted[1]["batches"][step]
        assert sorted(batch) == sorted(both)
    assert resumed[0]["losses"] == pytest.approx(uninterrupted[0]["losses"][3:], rel=1e-5)
    assert len(resumed[0]["losses"]) == 5


GROWING = RampUp(start=2, increment=2, samples=12)


def test_batches_that_grow_are_counted_and_resumed(folder):
    """Eight steps of 2, 2, 4, 4, 6, 8, 8, 8 samples; after the third, one replica goes on where two were."""
    fit = functools.partial(_fit, ramp_up=GROWING)
    whole = run_in_pool(2, fit, folder, Layout(dp=2), 8)
    begun = run_in_pool(2, fit, folder, Layout(dp=2), 8, 3)
    both = [whole[0]["batches"][step] + whole[1]["batches"][step] for step in range(8)]
    assert [len(batch) for batch in both] == [GROWING.size(GROWING.consumed(step, 8), 8) for step in range(8)]
    assert whole[0]["step"] == 8
    resumed = run_in_pool(1, fit, folder, Layout(), 8, None, begun[0]["path"])[0]
    assert [sorted(batch) for batch in resumed["batches"]] == [sorted(batch) for batch in both[3:]]
    assert resumed["losses"] == pytest.approx(whole[0]["losses"][3:], rel=1e-5)


def test_another_order_is_refused_at_a_resume(folder):
    begun = run_in_pool(1, _fit, folder, Layout(), 8, 3)
    path = begun[0]["path"]
    with pytest.raises(RankError, match=r"train_samples=64, and now 80.*Give train_samples=64"):
        run_ranks(1, _fit, folder, Layout(), 10, None, path)
    with pytest.raises(RankError, match=r"seed=1234, and now 5\. Set it as it was"):
        run_ranks(1, functools.partial(_fit, seed=5), folder, Layout(), 8, None, path)
    longer = run_in_pool(1, functools.partial(_fit, train_samples=64), folder, Layout(), 10, None, path)
    assert longer[0]["step"] == 10


def _tested(folder: str, path: str) -> float:
    run = trainer(Layout())
    return run.test(MODULES["gpt"](), datamodule=make("gpt", folder), ckpt_path=path, verbose=False)[0]["test_loss"]


def test_an_evaluation_of_a_checkpoint_is_no_resume(folder):
    begun = run_in_pool(1, _fit, folder, Layout(), 8, 3)
    assert run_in_pool(1, _tested, folder, begun[0]["path"])[0] > 0


def _refused(folder: str) -> None:
    train("gpt", folder, Layout(tp=2), 1)


def test_a_corrupt_index_leaves_no_rank_waiting(tmp_path):
    write_all(tmp_path)
    _, idx_path = files(tmp_path / "gpt")
    idx_path.write_bytes(idx_path.read_bytes()[:-8])
    with pytest.raises(RankError, match="gpt.idx has .* cut short") as error:
        run_ranks(2, _refused, str(tmp_path), timeout=60)
    assert "it still ran" not in str(error.value)


def _on_two_machines(folder: str) -> list:
    rank = int(os.environ["RANK"])
    module = make("bert", folder, cache_dir=f"{folder}/cache-{rank}", train_samples=16)
    dist.init_process_group("gloo")
    module.prepare_data()  # each is the first rank of its machine
    module.setup()
    return [batch["text"].tolist() for batch in module.train_dataloader()]


def test_machines_without_a_shared_folder_build_their_own_cache(folder):
    """megatron-core's builders build on rank 0 alone: another machine's ranks would look for files that it has not."""
    first, second = run_ranks(2, _on_two_machines, folder)
    assert first == second
    assert all(len(list(Path(folder, f"cache-{rank}").iterdir())) == 3 for rank in range(2))


class _Reader(BoringModel):
    def training_step(self, batch, batch_idx):
        self.__dict__.setdefault("rows", []).extend(batch["tokens"].tolist())
        return self.layer(torch.ones(1, 32)).sum()

    def validation_step(self, batch, batch_idx):
        pass


def _ddp(folder: str) -> list:
    model = _Reader()
    run = Trainer(accelerator="cpu", strategy="ddp", devices=2, max_steps=5, num_sanity_val_steps=0, **QUIET)
    run.fit(model, datamodule=make("gpt", folder))
    return model.rows


def test_lightnings_ddp_reads_the_same_samples(folder):
    first, second = run_in_pool(2, _ddp, folder)
    (alone,) = run_in_pool(1, _fit, folder, Layout(), 5)
    assert len(first) == len(second) == 20
    assert sorted(first + second) == sorted(row for batch in alone["batches"] for row in batch)


def _corrupted(folder: str, layout: Layout, steps: int, resume: str | None = None) -> list[float]:
    """T5 on spans that a loader's workers take out."""
    seed_everything(3)
    g = torch.Generator().manual_seed(2)
    samples = [{"input_ids": torch.randint(20, 200, (30,), generator=g)} for _ in range(36)]
    seen = Seen()
    saving = ModelCheckpoint(f"{folder}/spans-{layout}", filename="{step}", every_n_train_steps=5, save_top_k=-1)
    loader = DataLoader(
        samples,
        batch_size=4,
        shuffle=True,
        num_workers=2,
        collate_fn=SpanCorruptionCollator(range(5, 15), 30, eos_id=4, mean_span_length=1.0),
    )
    run = trainer(layout, max_steps=steps, callbacks=[seen, saving], enable_checkpointing=True)
    run.fit(MODULES["t5"](), loader, ckpt_path=resume)
    return seen.losses


def test_a_resumed_run_takes_out_the_same_spans(tmp_path):
    """Two ranks of one replica, in the middle of an epoch of nine batches; then the next epoch.

    After five batches the sixth is made by the other one of two workers, in the resumed run by the first.
    """
    layout = Layout(tp=2)
    whole = run_in_pool(2, _corrupted, str(tmp_path), layout, 12)
    resumed = run_in_pool(2, _corrupted, str(tmp_path), layout, 12, f"{tmp_path}/spans-{layout}/step=5.ckpt")
    for rank in range(2):
        assert len(whole[rank]) == 12
        assert resumed[rank] == whole[rank][5:]


def _packed(folder: str, layout: Layout, samples: GPTSamples, resets: dict) -> list[float]:
    seen = Seen()
    run = trainer(layout, max_steps=3, limit_val_batches=0, callbacks=[seen])
    run.fit(LoadedGPT(GPT2, **resets), datamodule=make("gpt", folder, samples=samples))
    return seen.losses


@pytest.mark.parametrize("layout", [Layout(tp=2, sp=True), Layout(pp=2)], ids=str)
def test_documents_are_kept_apart_by_the_data_as_by_the_module(folder, layout):
    """Megatron's masks and positions, against those that ``GPTModule`` makes of the same tokens on one rank.

    Sequence parallelism pads their 11 tokens, and the masks with them.
    """
    resets = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    by_data = run_in_pool(2, _packed, folder, layout, GPTSamples(11, **resets), {})
    (by_module,) = run_in_pool(1, _packed, folder, Layout(), GPTSamples(11), {"eod_id": 4, **resets})
    (joined,) = run_in_pool(1, _packed, folder, Layout(), GPTSamples(11), {})
    assert by_module != pytest.approx(joined, rel=1e-3)
    for losses in by_data:
        assert losses == pytest.approx(by_module, rel=1e-6)


def _accumulated(folder: str) -> torch.Tensor:
    return _fit(folder, Layout(), 2, accumulate=3)["batches"]


def test_samples_follow_from_steps_and_accumulation(folder):
    (batches,) = run_in_pool(1, _accumulated, folder)
    rows = [tuple(row) for batch in batches for row in batch]
    assert (len(batches), len(rows), len(set(rows))) == (6, 48, 48)


def _predicted(folder: str) -> int:
    run = trainer(Layout(tp=2))
    logits = run.predict(MODULES["gpt"](), datamodule=make("gpt", folder))
    return sum(len(batch) for batch in logits)


def test_predictions_run_over_the_test_part(folder):
    seen = run_in_pool(2, _predicted, folder)
    assert seen[0] == seen[1] > 0
