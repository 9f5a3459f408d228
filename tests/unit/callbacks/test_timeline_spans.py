"""Which pass a span of the timeline is, how idle a stage was, and arguments that are refused."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_megatron import ParallelLayout
from lightning_megatron.callbacks import PipelineTimeline, Profile
from lightning_megatron.callbacks.timeline import RankTimeline, Span, bubble, ideal_bubble, spans
from lightning_megatron.distributed.layout import RankCoordinates
from lightning_megatron.training.timers import Interval


def test_which_pass_is_which():
    """The order of Narayanan and others' figure 4: two stages, two chunks, four micro-batches."""
    layout = ParallelLayout(world_size=2, pp=2, vp=2)
    forwards = [Interval("forward-compute", n, n + 0.5) for n in range(8)]
    backwards = [Interval("backward-compute", n, n + 0.5) for n in range(8, 16)]
    found = [(span.micro_batch, span.chunk) for span in spans([*forwards, *backwards], layout)]
    first = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    assert found[:8] == first
    assert found[8:] == [(number, 1 - chunk) for number, chunk in first]


def test_idle_shares():
    def row(rank, *times):
        place = RankCoordinates(tp=0, cp=0, dp=0, pp=rank)
        return RankTimeline(rank, place, tuple(Span("forward", start, end) for start, end in times))

    assert bubble([row(0, (0, 1), (1, 2)), row(1, (1, 2), (2, 3))]) == pytest.approx(1 / 3)
    assert ideal_bubble(ParallelLayout(world_size=2, pp=2), 2) == pytest.approx(1 / 3)
    assert ideal_bubble(ParallelLayout(world_size=4, pp=4, vp=2), 8) == pytest.approx(3 / 19)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PipelineTimeline(0), r"PipelineTimeline\(steps=0\): steps are numbered from 1"),
        (lambda: PipelineTimeline([]), "steps are numbered from 1"),
        (lambda: Profile(3, 2), r"Profile\(first=3, last=2\): steps are numbered"),
        (lambda: Profile(tool="vtune"), "use 'torch' or 'nsight'"),
        (lambda: Profile(tool="nsight"), "needs a GPU"),
    ],
)
def test_refusals(make, says):
    if torch.cuda.is_available() and says == "needs a GPU":
        return
    with pytest.raises(MisconfigurationException, match=says):
        make()
