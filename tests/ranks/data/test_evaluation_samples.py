"""An evaluation counts each sample once, and predictions come once and in order, whatever makes the batches."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, Subset

from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.lightning_runs import CONFIG, OurGPT, trainer_of
from tests.support.ranks import run_in_pool

ROWS = 9
EVERY = tuple(range(ROWS))


class Counts(OurGPT):
    """Logs the number of rows that are counted."""

    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        self.log("rows", float(len(output)), reduce_fx="sum", on_step=False, on_epoch=True)
        return super().loss(output, batch)


class InPairs(BatchSampler):
    """A user's batches, made as they are asked for."""


class Prepared:
    """A user's batches, all made at once, by something that is no BatchSampler; the longer ones first."""

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool) -> None:
        self.batch_size, self.drop_last = batch_size, drop_last
        self.batches = list(BatchSampler(sampler, batch_size, drop_last))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


class Backwards(Sampler):
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Any:
        return iter(range(self.rows - 1, -1, -1))


class WholeBatches(Dataset):
    """Its elements are batches, the last of one row."""

    def __len__(self) -> int:
        return (ROWS + 1) // 2

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {name: value[2 * i : 2 * i + 2] for name, value in text_samples(CONFIG, ROWS).items()}


class Sharded(IterableDataset):
    """A stream that its user shares out: five rows and four."""

    def __init__(self, rank: int, replicas: int) -> None:
        self.rank, self.replicas = rank, replicas

    def __iter__(self) -> Any:
        yield from (Rows(text_samples(CONFIG, ROWS))[i] for i in range(self.rank, ROWS, self.replicas))


# the loader of a rank, and whether Lightning may give it a sampler
LOADERS: dict[str, Any] = {
    "batch sampler": lambda rank, dp: (_loader(batch_sampler=InPairs(range(ROWS), 2, False)), True),
    "prepared batches": lambda rank, dp: (_loader(batch_sampler=Prepared(range(ROWS), 2, False)), True),
    "batch_size=None": lambda rank, dp: (DataLoader(WholeBatches(), batch_size=None), True),
    "sampler": lambda rank, dp: (_loader(batch_size=2, sampler=Backwards(ROWS)), True),
    "own shares": lambda rank, dp: (_loader(batch_size=2, sampler=_share(rank, dp)), False),
    "own shares in own batches": lambda rank, dp: (_loader(batch_sampler=InPairs(_share(rank, dp), 2, False)), False),
    "shared stream": lambda rank, dp: (DataLoader(Sharded(rank, dp), batch_size=1), True),
    "one row": lambda rank, dp: (_loader(1, batch_sampler=InPairs(range(1), 2, False)), True),
    "dropped rows": lambda rank, dp: (_loader(7, batch_size=2, drop_last=True), True),
    "several": lambda rank, dp: ([_loader(batch_sampler=InPairs(range(ROWS), 2, False)), _loader(batch_size=1)], True),
}
COUNTED = {"one row": (0,), "dropped rows": (0, 1, 2, 3, 4, 6)}  # of seven rows, replicas have 0, 2, 4, 6 and 1, 3, 5


def _loader(rows: int = ROWS, **options: Any) -> DataLoader:
    return DataLoader(Rows(text_samples(CONFIG, rows)), **options)


def _share(rank: int, replicas: int) -> DistributedSampler:
    return DistributedSampler(range(ROWS), replicas, rank, shuffle=False)  # type: ignore[arg-type]


def _expected() -> dict[Any, Any]:
    """Of some rows: their loss and number, and their logits."""
    results = {}
    for rows in (*COUNTED.values(), EVERY):
        data = DataLoader(Subset(Rows(text_samples(CONFIG, ROWS)), rows), batch_size=4)
        [validated] = trainer_of(Layout(), ".").validate(Counts(CONFIG), data, verbose=False)
        results[rows] = (validated, torch.cat(trainer_of(Layout(), ".").predict(Counts(CONFIG), data)))
    return results


def _evaluated(layout: Layout) -> dict[str, Any]:
    module, results = Counts(CONFIG), {}
    for kind, make in LOADERS.items():
        run = trainer_of(layout, ".", max_steps=1, limit_val_batches=1.0)
        rank = run.strategy.data_parallel_rank
        loader, use = make(rank, layout.dp)
        run = trainer_of(layout, ".", max_steps=1, limit_val_batches=1.0, use_distributed_sampler=use)
        validated = run.validate(module, loader, verbose=False)
        validated += run.test(module, loader, verbose=False) if kind == "batch sampler" else []
        predicted = None
        if kind not in ("several", "dropped rows"):
            loader, _ = make(rank, layout.dp)
            predicted = torch.cat(run.predict(module, loader))
        results[kind] = (validated, predicted)
    return results


def test_every_sample_counts_once():
    [expected] = run_in_pool(1, _expected)
    for rank, results in enumerate(run_in_pool(2, _evaluated, Layout(dp=2))):
        for kind, (validated, predicted) in results.items():
            metrics, logits = expected[COUNTED.get(kind, EVERY)]
            for seen in validated:  # token sums in another order
                assert sorted(seen.values()) == pytest.approx(sorted(metrics.values()), rel=1e-5), kind
            if kind == "shared stream":  # each replica keeps its own
                logits = logits[rank::2]
            if predicted is not None:
                torch.testing.assert_close(predicted, logits, rtol=1e-4, atol=1e-5, msg=lambda text, k=kind: k + text)


class Notes(Counts):
    """Keeps by itself what it has seen, in containers of several kinds."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[torch.Tensor] = []
        self.number, self.by_name, self.total = 0, {"sums": [torch.zeros(1)]}, torch.zeros(1)
        self.register_buffer("summed", torch.zeros(1), persistent=False)
        self.ends = 0

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().validation_step(batch, batch_idx)
        if self.on_last_stage:
            values = batch["labels"].float().sum(1)
            self.seen.append(values)
            self.number += len(values)
            self.by_name["sums"][0] += values.sum()
            self.total = self.total + values.sum()
            self.summed += values.sum()
        return output

    def on_validation_batch_end(self, outputs: Any, batch: Any, *_: Any) -> None:
        self.ends += len(batch["labels"])

    def noted(self) -> list[float]:
        sums = [self.by_name["sums"][0], self.total, self.summed, sum((x.sum() for x in self.seen), torch.zeros(1))]
        return [float(self.number), *map(float, sums)]


class Ends(Callback):
    def __init__(self) -> None:
        self.rows = 0

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.rows += len(batch["labels"])


def _noted(layouts: list[Layout]) -> list[Any]:
    found = []
    for layout in layouts:
        module, ends = Notes(CONFIG), Ends()
        trainer_of(layout, ".", callbacks=[ends], limit_val_batches=1.0).validate(
            module, _loader(batch_size=4 // layout.dp), verbose=False
        )
        found.append((module.noted(), [module.ends, ends.rows]))
    return found


def test_what_a_module_or_a_callback_notes_down_counts_once():
    labels = float(text_samples(CONFIG, ROWS)["labels"].sum())
    # the replicas have five and four rows, in batches of two: the second computes its last batch again;
    # interleaved stages fill up a batch of one row with another micro-batch
    (first, last), (other, stage) = zip(*run_in_pool(2, _noted, [Layout(dp=2), Layout(pp=2, vp=2)]), strict=True)
    assert [a + b for a, b in zip(first[0], last[0], strict=True)] == [ROWS] + [labels] * 4
    assert [a + b for a, b in zip(first[1], last[1], strict=True)] == [ROWS] * 2
    assert stage == ([ROWS] + [labels] * 4, [ROWS] * 2)
    assert other == ([0.0] * 5, [ROWS] * 2)
