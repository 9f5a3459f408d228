"""An evaluation counts each sample once, and predictions come once and in order, whatever makes the batches."""

from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, Subset

from tests.lightning_runs import CONFIG, OurGPT
from tests.parallel_gpt import Layout, Rows, text_samples
from tests.ranks import run_ranks
from tests.test_callbacks import _trainer

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
        [validated] = _trainer(Layout(), ".").validate(Counts(CONFIG), data, verbose=False)
        results[rows] = (validated, torch.cat(_trainer(Layout(), ".").predict(Counts(CONFIG), data)))
    return results


def _evaluated(layout: Layout) -> dict[str, Any]:
    module, results = Counts(CONFIG), {}
    for kind, make in LOADERS.items():
        run = _trainer(layout, ".", max_steps=1, limit_val_batches=1.0)
        rank = run.strategy.data_parallel_rank
        loader, use = make(rank, layout.dp)
        run = _trainer(layout, ".", max_steps=1, limit_val_batches=1.0, use_distributed_sampler=use)
        validated = run.validate(module, loader, verbose=False)
        validated += run.test(module, loader, verbose=False) if kind == "batch sampler" else []
        predicted = None
        if kind not in ("several", "dropped rows"):
            loader, _ = make(rank, layout.dp)
            predicted = torch.cat(run.predict(module, loader))
        results[kind] = (validated, predicted)
    return results


def test_every_sample_counts_once():
    [expected] = run_ranks(1, _expected)
    for rank, results in enumerate(run_ranks(2, _evaluated, Layout(dp=2))):
        for kind, (validated, predicted) in results.items():
            metrics, logits = expected[COUNTED.get(kind, EVERY)]
            for seen in validated:  # token sums in another order
                assert sorted(seen.values()) == pytest.approx(sorted(metrics.values()), rel=1e-5), kind
            if kind == "shared stream":  # each replica keeps its own
                logits = logits[rank::2]
            if predicted is not None:
                torch.testing.assert_close(predicted, logits, rtol=1e-4, atol=1e-5, msg=lambda text, k=kind: k + text)
