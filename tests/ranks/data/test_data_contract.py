"""Data under the strategy: who reads what, augmentation, loaders of every kind, evaluations and predictions."""

import itertools
import os
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import DataCollatorForLanguageModeling

from lightning_megatron import GPTModule
from lightning_megatron.strategy.dataloading.rank_consistency import DataError
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.lightning_runs import CONFIG, OurGPT, VanillaGPT, trainer_of
from tests.support.plain_module import PlainModule
from tests.support.ranks import RankError, run_in_pool, run_ranks
from tests.support.trainer import QUIET, trainer

SHARED = Layout(cp=2, dp=2)  # two ranks of each replica share the tokens of its rows
LAYOUTS = [Layout(pp=2), Layout(tp=2, dp=2), Layout(pp=2, dp=2), Layout(pp=2, vp=2)]
IDS = {"ids": str}


class Seen(Callback):
    """Keeps the numbers of the samples (their first token here) that this rank reads."""

    def __init__(self) -> None:
        self.train: list[list[float]] = []
        self.val: list[list[float]] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.train.append(batch["number"].tolist())

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0) -> None:
        self.val.append(batch["number"].tolist())


class Numbered(Dataset):
    """Samples that know their number, and are augmented at random."""

    def __init__(self, rows: int, augment: bool = False) -> None:
        self.rows = Rows(text_samples(CONFIG, rows))
        self.augment = augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        noise = (torch.rand(()) + random.random() + float(np.random.rand())) / 3 if self.augment else 0.0
        return {**self.rows[i], "number": torch.tensor(i + noise)}


class Stream(IterableDataset):
    """As many rows as it is told, of unknown number."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self):
        yield from (Numbered(self.rows)[i] for i in range(self.rows))


class Stateful(DataLoader):
    """A loader that says where it is, as torchdata's StatefulDataLoader does."""

    start = read = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.read = number + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["read"]


def _fit(layout: Layout, kind: str) -> dict[str, Any]:
    if kind in ("seeded", "workers", "unsampled"):
        seed_everything(3, workers=True)
    else:  # whatever a script may have drawn before
        rank = int(os.environ["RANK"])
        random.seed(rank), np.random.seed(rank), torch.rand(rank)
    options: dict[str, Any] = {"max_epochs": 2, "max_steps": -1, "limit_val_batches": 0}
    loader: Any = DataLoader(Numbered(24, augment=True), batch_size=4, shuffle=True)
    if kind == "workers":
        loader = DataLoader(Numbered(24, augment=True), batch_size=4, num_workers=2)
    elif kind in ("unsampled", "unsampled and unseeded"):
        options["use_distributed_sampler"] = False
    elif kind == "iterable":
        loader = DataLoader(Stream(24), batch_size=4)
    elif kind == "stateful":
        loader = Stateful(Numbered(24), batch_size=4)
    seen = Seen()
    run = trainer_of(layout, ".", callbacks=[seen], **options)
    run.fit(OurGPT(CONFIG), loader)
    return {"dp": run.strategy.data_parallel_rank, "train": seen.train, "steps": run.global_step}


KINDS = ["seeded", "unseeded", "workers", "unsampled", "unsampled and unseeded", "iterable", "stateful"]


@pytest.mark.parametrize(
    ("layout", "kind"),
    [*itertools.product(LAYOUTS[:3], KINDS), *((SHARED, kind) for kind in ("workers", "unsampled and unseeded"))],
    ids=str,
)
def test_peers_read_the_same_and_replicas_share_the_samples(layout, kind):
    ranks = run_in_pool(layout.world_size, _fit, layout, kind)
    replicas: dict[int, Any] = {}
    for rank in ranks:
        assert rank["train"] == replicas.setdefault(rank["dp"], rank["train"]), "peers differ"
    whole = kind in ("iterable", "unsampled", "unsampled and unseeded")  # Lightning shares none of these out
    epoch = ranks[0]["steps"] // 2
    numbers = sorted(int(n) for batches in replicas.values() for batch in batches[:epoch] for n in batch)
    assert numbers == sorted(list(range(24)) * (layout.dp if whole else 1))
    if kind in ("seeded", "workers", "unsampled"):
        first, second = replicas[0][:epoch], replicas[0][epoch:]
        assert first != second, "augmentation repeats itself"


class ByRank(IterableDataset):
    """Sharded by the rank of the world: a mistake."""

    def __init__(self, even: bool) -> None:
        self.even = even

    def __iter__(self):
        rank = int(os.environ["RANK"])
        data = Numbered(64)
        yield from (data[i] for i in (range(16 + 8 * rank) if not self.even else range(rank, 32, 2)))


def _fit_by_rank(layout: Layout, even: bool) -> None:
    trainer_of(layout, ".").fit(OurGPT(CONFIG), DataLoader(ByRank(even), batch_size=4))


def test_peers_that_read_different_data_are_told():
    with pytest.raises(
        RankError, match=r"Ranks \[0, 1\] hold one model together.*\[0\] have read one batch, and ranks \[1\] another"
    ) as error:
        run_ranks(2, _fit_by_rank, Layout(pp=2), True, timeout=40)
    assert "gave no result" not in str(error.value)


class OtherLength(IterableDataset):
    """On the last rank, the rows of the third batch are shorter."""

    def __iter__(self):
        last = int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"])
        for number, row in enumerate(Rows(text_samples(CONFIG, 16))):
            length = 7 if last and number // 4 == 2 else None
            yield {key: value[:length] for key, value in row.items()}


def _read_other_lengths(layout: Layout, hook: str) -> tuple[str, int]:
    run = trainer_of(layout, ".", limit_val_batches=3)
    loader = DataLoader(OtherLength(), batch_size=4)
    try:
        run.fit(OurGPT(CONFIG), loader) if hook == "fit" else run.validate(OurGPT(CONFIG), loader, verbose=False)
    except DataError as error:
        return str(error), run.global_step
    return "nothing", run.global_step


@pytest.mark.parametrize(("layout", "hook"), [(Layout(tp=2), "fit"), (Layout(pp=2), "validate")], ids=str)
def test_a_later_batch_of_another_length_is_told(layout, hook):
    for told, steps in run_ranks(2, _read_other_lengths, layout, hook, timeout=60):
        assert steps == (2 if hook == "fit" else 0)
        whole = rf"\[4, {CONFIG.seq_length}\]"
        assert re.search(
            rf"In this batch, ranks \[0\] have read .*{whole}, ranks \[1\] have read .*\[4, 7\]\.", told
        ), told


def _fit_unevenly(layout: Layout) -> None:
    run = trainer_of(layout, ".", max_steps=-1, max_epochs=1)
    run.fit(OurGPT(CONFIG), DataLoader(ByRank(even=False), batch_size=4))


def test_replicas_with_unequally_many_batches_are_told():
    with pytest.raises(RankError, match=r"loader of ranks \[0\] ended after 4 batches") as error:
        run_ranks(2, _fit_unevenly, Layout(dp=2), timeout=40)
    assert "gave no result" not in str(error.value)


def _fit_nothing(layout: Layout) -> None:
    run = trainer_of(layout, ".", max_steps=-1, max_epochs=1)
    run.fit(OurGPT(CONFIG), DataLoader(Stream(0), batch_size=4))


def test_an_empty_stream_is_refused():
    with pytest.raises(RankError, match="gave no batch on any rank"):
        run_ranks(2, _fit_nothing, Layout(pp=2), timeout=40)


def _evaluate(layout: Layout | None, rows: list[int]) -> dict[str, Any]:
    dp = layout.dp if layout else 1
    loaders = [DataLoader(Rows(text_samples(CONFIG, n)), batch_size=4 // dp) for n in rows]
    module: Any = OurGPT(CONFIG) if layout else VanillaGPT()
    run = trainer_of(layout, ".", max_steps=1, limit_val_batches=1.0)
    results = run.validate(module, loaders, verbose=False)
    results += run.test(module, loaders, verbose=False) if layout else []
    run.fit(module, DataLoader(Rows(text_samples(CONFIG, 4)), batch_size=4 // dp), loaders)
    results.append({name: float(v) for name, v in run.callback_metrics.items() if "val" in name})
    return {"results": results}


@pytest.mark.parametrize(
    ("layout", "rows"), [*itertools.product(LAYOUTS, ([7], [9], [5, 11])), (SHARED, [5, 11])], **IDS
)
def test_each_sample_of_an_evaluation_counts_once(layout, rows):
    validated = run_in_pool(1, _evaluate, None, rows)[0]["results"]
    expected = validated[: len(rows)]
    for rank in run_in_pool(layout.world_size, _evaluate, layout, rows):
        got = rank["results"]
        for mine, reference in zip(got[: len(rows)], expected, strict=True):
            assert mine == pytest.approx(reference, rel=1e-5)
        tested = {k: v for result in got[len(rows) : 2 * len(rows)] for k, v in result.items()}
        assert sorted(tested.values()) == pytest.approx(
            sorted(v for result in expected for v in result.values()), rel=1e-5
        )
        assert got[-1] == pytest.approx(validated[-1], rel=1e-5)


class LogsInside(OurGPT):
    """Logs in its loss, and on some ranks only."""

    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        self.log("rows", float(len(output)), reduce_fx="sum", on_step=True, on_epoch=True)
        if self.trainer.is_global_zero or self.trainer.strategy.data_parallel_rank == 1:
            self.log("some", 3.0, rank_zero_only=True)
        return super().loss(output, batch)


def _log_inside(layout: Layout) -> Any:
    run = trainer_of(layout, ".", max_steps=2)
    data = DataLoader(Rows(text_samples(CONFIG, 9)), batch_size=4 // layout.dp)
    [validated] = run.validate(LogsInside(CONFIG), data, verbose=False)
    run.fit(LogsInside(CONFIG), data)
    return {name: value for name, value in validated.items() if "rows" in name}


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2), Layout(pp=2, dp=2)], **IDS)
def test_logging_by_some_replicas_only(layout):
    for seen in run_in_pool(layout.world_size, _log_inside, layout, timeout=60):
        assert seen == {"rows_epoch": 9.0}


def _drop_last(layout: Layout) -> int:
    seen = Seen()
    data = DataLoader(Numbered(15), batch_size=4, drop_last=True)
    trainer_of(layout, ".", callbacks=[seen]).validate(OurGPT(CONFIG), data, verbose=False)
    return len(seen.val)


def test_replicas_drop_equally_many_last_batches():
    assert run_in_pool(2, _drop_last, Layout(dp=2), timeout=60) == [2, 2]


class Named(Dataset):
    """Samples with a string, whose length the loss counts."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> Any:
        return {"x": torch.full((4,), i / 16), "y": torch.tensor([i / 8]), "name": str(i)}


class Reads(PlainModule):
    optimizer = staticmethod(lambda parameters: torch.optim.SGD(parameters, lr=0.05))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert [float(name) / 16 for name in batch["name"]] == batch["x"][:, 0].tolist()
        return {"loss": super().training_step(batch, batch_idx), "guess": self.layers(batch["x"])}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.__dict__.setdefault("told", []).append(tuple(outputs["guess"].shape))


def _read_names() -> Any:
    module, data = Reads(), DataLoader(Named(), batch_size=4)
    trainer(Layout(), {"num_microbatches": 2}, max_steps=2).fit(module, data)
    before = [p.detach().clone() for p in module.parameters()]
    Trainer(accelerator="cpu", devices=1, max_steps=2, **QUIET).fit(module, data)
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    before = [p.detach().clone() for p in module.parameters()]
    trainer(Layout(), {"num_microbatches": 2}, max_steps=2).fit(module, data)
    again = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    return module.told, all(moved), all(again)


def test_strings_are_cut_too_outputs_come_back_and_another_strategy_goes_on():
    [(told, moved, again)] = run_in_pool(1, _read_names)
    assert told == [(4, 1)] * 6
    assert moved
    assert again


def _predict(layout: Layout | None, rows: int) -> Any:
    dp = layout.dp if layout else 1
    data = [DataLoader(Rows(text_samples(CONFIG, n)), batch_size=4 // dp) for n in (rows, 6)]
    first, second = trainer_of(layout, ".").predict(OurGPT(CONFIG), data)
    return torch.cat(first), torch.cat(second)


@pytest.mark.parametrize(("layout", "rows"), [*itertools.product([*LAYOUTS, Layout(dp=4)], (7, 9)), (SHARED, 7)], **IDS)
def test_predictions_are_in_the_datas_order(layout, rows):
    def truth(n: int) -> torch.Tensor:
        weights = plain_gpt.initial_weights(CONFIG)
        return plain_gpt.logits(CONFIG, weights, text_samples(CONFIG, n)["tokens"])

    for first, second in run_in_pool(layout.world_size, _predict, layout, rows):
        torch.testing.assert_close(first, truth(rows), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second, truth(6), rtol=1e-4, atol=1e-5)


class Pads:
    """As much of a tokenizer as the collator asks for."""

    pad_token_id, padding_side, mask_token, pad_token = 0, "right", None, "<pad>"

    def pad(self, features: Any, return_tensors: str, **_: Any) -> Any:
        from transformers import BatchEncoding

        length = max(len(f["input_ids"]) for f in features)
        ids = [f["input_ids"] + [0] * (length - len(f["input_ids"])) for f in features]
        keep = [[1] * len(f["input_ids"]) + [0] * (length - len(f["input_ids"])) for f in features]
        return BatchEncoding({"input_ids": ids, "attention_mask": keep}, tensor_type=return_tensors)


def _collated(layout: Layout) -> float:
    rows = [{"input_ids": list(range(1, 2 + n % 11 + 4))} for n in range(8)]
    loader = DataLoader(rows, batch_size=4, collate_fn=DataCollatorForLanguageModeling(Pads(), mlm=False))  # type: ignore[arg-type]
    return trainer_of(layout, ".").validate(OurGPT(CONFIG), loader, verbose=False)[0]["val_loss"]


def test_transformers_own_collator():
    one = run_in_pool(1, _collated, Layout())
    assert run_in_pool(2, _collated, Layout(pp=2)) == pytest.approx(one * 2, rel=1e-5)


def _ignored(labels_only: bool) -> float:
    samples = text_samples(CONFIG, 4)
    samples["loss_mask"][:, 5:] = 0
    if labels_only:
        samples["labels"] = samples["labels"].clone()
        samples["labels"][:, 5:] = -100
        del samples["loss_mask"]
    data = DataLoader(Rows(samples), batch_size=4)
    return trainer_of(Layout(), ".").validate(OurGPT(CONFIG), data, verbose=False)[0]["val_loss"]


def test_labels_of_minus_100_are_a_loss_mask():
    assert run_in_pool(1, _ignored, True) == pytest.approx(run_in_pool(1, _ignored, False), rel=1e-6)


def _two_layouts() -> None:
    module, data = GPTModule(CONFIG), DataLoader(Rows(text_samples(CONFIG, 8)), batch_size=4)
    trainer_of(Layout(tp=2), ".").fit(module, data)
    trainer_of(Layout(pp=2), ".").fit(module, data)


def test_a_module_of_another_layout_is_refused():
    with pytest.raises(RankError, match="was built for .*tp=2.*and this run has .*pp=2.*Make a new GPTModule"):
        run_ranks(2, _two_layouts, timeout=60)
