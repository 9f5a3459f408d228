"""Checkpoints in Lightning's own form: of a plain module on one rank, read by vanilla Lightning and on any replicas."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, DistributedSampler

from lightning_megatron import Checkpointing, MegatronStrategy
from lightning_megatron.checkpoint import CheckpointError
from tests.reference.parallel_gpt import LoadedGPT, Rows, text_samples
from tests.support.lightning_runs import CONFIG
from tests.support.ranks import run_ranks
from tests.support.trainer import QUIET

STOP, EPOCH, STEPS = 7, 10, 14


class Plain(LightningModule):
    """A frozen parameter among the trained ones, two groups, and a schedule; with dropout or without."""

    def __init__(self, dropout: float = 0.0, sgd: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = torch.nn.Linear(4, 3)
        self.fixed = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.last = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        hidden = self.first(torch.nn.functional.dropout(batch, self.hparams.dropout)) * self.fixed
        return self.last(hidden).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("unseen", self.last(self.first(batch) * self.fixed).square().mean(), batch_size=len(batch))

    def configure_optimizers(self):
        groups = [
            {"params": [self.first.weight, self.fixed, self.first.bias], "weight_decay": 0.1},
            {"params": list(self.last.parameters())},
        ]
        kind = torch.optim.SGD if self.hparams.sgd else torch.optim.AdamW
        optimizer = kind(groups, lr=1e-2, **({"momentum": 0.9} if self.hparams.sgd else {}))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def _rows():
    return torch.randn(40, 4, generator=torch.Generator().manual_seed(1))


def _fit(strategy, steps, *, resume=None, save=None, dropout=0.0, sgd=False, dp=1, shuffle=False, **options):
    seed_everything(3, verbose=False)
    module = Plain(dropout, sgd)
    run = Trainer(accelerator="cpu", devices=dp, strategy=strategy, max_steps=steps, **QUIET, **options)
    sampler = None if shuffle else DistributedSampler(_rows(), dp, run.global_rank, shuffle=False)
    run.fit(module, DataLoader(_rows(), batch_size=4 // dp, shuffle=shuffle, sampler=sampler), ckpt_path=resume)
    if save:
        run.save_checkpoint(save)
    return [value.detach().clone() for value in module.parameters()]


def _resumed(path, precision, sharded, sgd):
    options = {"dropout": 0.2, "sgd": sgd, "shuffle": True, "precision": precision}

    def strategy():
        return MegatronStrategy(distributed_optimizer=sharded)

    whole = _fit(strategy(), STEPS, **options)
    _fit(strategy(), STOP, save=path, **options)
    return whole, _fit(strategy(), STEPS, resume=path, **options)


@pytest.mark.parametrize(
    ("precision", "sharded", "sgd"), [("32-true", True, True), ("32-true", False, False), ("bf16-mixed", True, False)]
)
def test_a_run_resumes_from_its_file_to_the_bit(precision, sharded, sgd, tmp_path):
    path = tmp_path / "one.ckpt"
    [(whole, resumed)] = run_ranks(1, _resumed, path, precision, sharded, sgd)
    assert all(map(torch.equal, whole, resumed))
    state = torch.load(path, weights_only=True)
    assert {value.dtype for value in state["state_dict"].values()} == {torch.float32}  # the main weights, under bf16
    loaded = Plain.load_from_checkpoint(path)
    assert torch.equal(loaded.first.weight, state["state_dict"]["first.weight"])


def _between(folder):
    """To and from vanilla Lightning, which reads a batch of any such file twice (2.6), and so do we of its own."""
    found = {}
    for sgd in (False, True):
        vanilla, here = f"{folder}/vanilla{sgd}.ckpt", f"{folder}/here{sgd}.ckpt"
        _fit("auto", EPOCH, sgd=sgd, save=vanilla)
        _fit(MegatronStrategy(), EPOCH, sgd=sgd, save=here)
        truth, vanillas = _fit("auto", STEPS, sgd=sgd), _fit("auto", STEPS, sgd=sgd, resume=vanilla)
        found[sgd] = {
            "vanilla goes on with ours": (_fit("auto", STEPS, sgd=sgd, resume=here), vanillas),
            "we go on with ours": (_fit(MegatronStrategy(), STEPS, sgd=sgd, resume=here), truth),
            "we go on with vanilla's": (_fit(MegatronStrategy(), STEPS, sgd=sgd, resume=vanilla), vanillas),
        }
    return found


def _on_two(folder):
    return [
        _fit(MegatronStrategy(distributed_optimizer=sharded), STEPS, sgd=sgd, dp=2, resume=f"{folder}/here{sgd}.ckpt")
        for sgd in (False, True)
        for sharded in (True, False)
    ]


def test_files_go_to_and_from_vanilla_lightning_and_to_more_replicas(tmp_path):
    [found] = run_ranks(1, _between, tmp_path)
    for sgd, runs in found.items():
        for what, (weights, truth) in runs.items():  # within what the order of sums changes
            torch.testing.assert_close(weights, truth, rtol=1e-5, atol=1e-6, msg=f"{what}, {sgd=}")
    for on_rank in run_ranks(2, _on_two, tmp_path):
        for number, weights in enumerate(on_rank):
            truth = found[number > 1]["we go on with ours"][1]
            torch.testing.assert_close(weights, truth, rtol=1e-5, atol=1e-6)


class _Anything:
    pass


def _refused(folder):
    path, messages = Path(folder) / "one.ckpt", {}
    _fit(MegatronStrategy(), 2, save=path)
    content = path.read_bytes()
    cases = {
        "cut": lambda file: file.write_bytes(content[:900]),
        "text": lambda file: file.write_text("no checkpoint"),
        "none of it": lambda file: torch.save({"weights": 1}, file),
        "objects": lambda file: torch.save({**torch.load(path), "mine": _Anything()}, file),
    }
    for name, make in cases.items():
        make(Path(folder) / f"{name}.ckpt")
        with pytest.raises(CheckpointError) as error:
            _fit(MegatronStrategy(), 4, resume=f"{folder}/{name}.ckpt")
        messages[name] = str(error.value)
    _fit(MegatronStrategy(checkpointing=Checkpointing(allow_pickle=True)), 4, resume=f"{folder}/objects.ckpt")
    run = Trainer(accelerator="cpu", devices=1, strategy=MegatronStrategy(), max_steps=1, **QUIET)
    with pytest.raises(CheckpointError) as error:
        run.fit(LoadedGPT(CONFIG), DataLoader(Rows(text_samples(CONFIG, 4)), batch_size=4), ckpt_path=path)
    messages["a GPT"] = str(error.value)
    _fit(MegatronStrategy(checkpointing=Checkpointing(async_save=True)), 2, save=f"{folder}/directory.ckpt")
    assert Path(folder, "directory.ckpt").is_dir()
    _fit(MegatronStrategy(), 4, resume=f"{folder}/directory.ckpt")
    with pytest.raises(CheckpointError) as error:
        _fit(MegatronStrategy(), 4, save="/proc/one.ckpt")
    messages["not to be written"] = str(error.value)
    return messages


def test_what_is_no_such_file_is_refused_in_words(tmp_path):
    [messages] = run_ranks(1, _refused, tmp_path)
    assert "damaged or no checkpoint" in messages["cut"]
    assert "is no checkpoint" in messages["text"]
    assert "has no 'state_dict'" in messages["none of it"]
    assert "allow_pickle=True" in messages["objects"]
    assert "checkpoints of MegatronStrategy are directories" in messages["a GPT"]
    assert "was not saved" in messages["not to be written"]


class _Seen(Plain):
    """Keeps the numbers of the samples that it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[:, 0].int().tolist())
        return super().training_step(batch * 0.01, batch_idx)


def _numbers_seen(dp, steps, path, resume, shuffle):
    seed_everything(3, verbose=False)
    module = _Seen()
    rows = torch.arange(40.0)[:, None].expand(40, 4)
    run = Trainer(accelerator="cpu", devices=dp, strategy=MegatronStrategy(), max_steps=steps, **QUIET)
    run.fit(module, DataLoader(rows, batch_size=4 // dp, shuffle=shuffle), ckpt_path=resume)
    run.save_checkpoint(path)
    return module.seen


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_that_one_rank_began_ends_on_two_and_the_other_way_round(shuffle, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    [alone] = run_ranks(1, _numbers_seen, 1, 10, tmp_path / "whole", None, shuffle)
    [begun] = run_ranks(1, _numbers_seen, 1, 3, one, None, shuffle)
    on_two = run_ranks(2, _numbers_seen, 2, 7, two, one, shuffle)
    [ended] = run_ranks(1, _numbers_seen, 1, 10, tmp_path / "end", two, shuffle)
    together = [sorted(a + b) for a, b in zip(*on_two, strict=True)]
    assert [sorted(batch) for batch in begun] + together + [sorted(batch) for batch in ended] == [
        sorted(batch) for batch in alone
    ]
