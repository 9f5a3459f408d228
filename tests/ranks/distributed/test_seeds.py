"""Random numbers: what model-parallel ranks share, what they do not, and that a seed is honoured."""

import torch
from lightning.pytorch import seed_everything
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.utils.data import DataLoader

from lightning_megatron import GPTModule
from lightning_megatron.distributed.device import model_rng
from tests.reference import plain_gpt
from tests.reference.parallel_gpt import Rows, text_samples
from tests.support.layout import Layout
from tests.support.ranks import run_ranks
from tests.support.trainer import trainer

DROPPING = plain_gpt.replace(plain_gpt.GPT2, hidden_dropout=0.2, attention_dropout=0.2)


class Start(GPTModule):
    """Keeps the weights it started from."""

    def on_fit_start(self):
        self.start = {name: value.detach().clone() for name, value in self.named_parameters()}
        with model_rng():
            self.shared = torch.rand(4)
            with get_cuda_rng_tracker().fork():
                self.own = torch.rand(4)


def _fit(layout: Layout, seed: int) -> dict:
    seed_everything(seed)
    module = Start(DROPPING)
    run = trainer(layout, max_steps=3)
    run.fit(module, DataLoader(Rows(text_samples(DROPPING, 24)), batch_size=4))
    place = (run.strategy.tensor_parallel_rank, run.strategy.pipeline_parallel_rank, run.strategy.data_parallel_rank)
    loss = float(run.callback_metrics["train_loss"])
    return {"place": place, "start": module.start, "shared": module.shared, "own": module.own, "loss": loss}


def test_what_ranks_share():
    for layout in (Layout(tp=2, pp=2), Layout(tp=2, dp=2)):
        ranks = {seen["place"]: seen for seen in run_ranks(4, _fit, layout, 1)}
        first = ranks[0, 0, 0]
        for (tp, pp, dp), seen in ranks.items():
            assert torch.equal(seen["shared"], first["shared"]) == (pp == 0), (tp, pp, dp)
            assert torch.equal(seen["own"], first["own"]) == (tp == 0 and pp == 0), (tp, pp, dp)
            if pp == 0:
                pairs = [(name, torch.equal(seen["start"][name], value)) for name, value in first["start"].items()]
                # Vocabulary shards and the like differ between tensor-parallel ranks; norms and positions do not.
                apart = [name for name, equal in pairs if not equal]
                assert bool(apart) == (tp == 1), (tp, pp, dp, apart)
                assert all("norm" not in name and "position" not in name for name in apart)


def test_ranks_that_share_rows_start_alike_and_drop_apart():
    first, second = run_ranks(2, _fit, Layout(cp=2), 1)
    for name, value in first["start"].items():
        assert torch.equal(second["start"][name], value), name
    assert not torch.equal(first["shared"], second["shared"])  # of hidden states
    assert not torch.equal(first["own"], second["own"])  # of attention
    assert first["loss"] == second["loss"]


def test_the_same_seed_gives_the_same_run_and_another_one_does_not():
    layout = Layout(tp=2, sp=True)
    first, again, other = (run_ranks(2, _fit, layout, seed)[0]["loss"] for seed in (1, 1, 2))
    assert first == again
    assert first != other
