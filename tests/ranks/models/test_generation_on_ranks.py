"""What two ranks are asked to generate together: refused where it differs, and streamed on the first."""

import pytest
import torch

from tests.support import writers
from tests.support.ranks import RankError, run_ranks

IDS = torch.arange(1, 7).view(2, 3)


def _differ(rank_prompts):
    module = writers.module("gpt2").build(tp=2)
    module.generate(rank_prompts[torch.distributed.get_rank()], max_new_tokens=3)


def test_ranks_of_a_replica_that_differ_are_told_so():
    with pytest.raises(RankError, match="prompts or settings of model-parallel rank 1 differ") as error:
        run_ranks(2, _differ, [IDS, IDS + 1])
    assert str(error.value).count("differ from those of rank 0") == 2
    with pytest.raises(RankError, match="Model-parallel rank 1 refuses its prompts: .*token id 305"):
        run_ranks(2, _differ, [IDS, IDS + 299])


def _stream():
    tokens = []
    module = writers.module("llama").build(pp=2)
    text = module.generate(IDS, max_new_tokens=5, stream=tokens.append)
    return text, tokens


def _unbuilt_among_ranks() -> None:
    writers.module("gpt2").build(pp=2)
    writers.module("gpt2").generate(IDS, max_new_tokens=2)


def test_a_rank_of_a_run_builds_no_whole_model_unasked():
    with pytest.raises(RankError, match=r"one of 2 ranks.*call build\(tp=..., pp=...\)"):
        run_ranks(2, _unbuilt_among_ranks)


def test_a_stream_has_every_token_on_the_first_rank():
    (text, tokens), (other, nothing) = run_ranks(2, _stream)
    assert torch.equal(torch.stack(tokens, dim=1), text[:, 3:])
    assert torch.equal(text, other)
    assert nothing == []


def _failing_stream():
    def stop(token):
        raise KeyError("stop")

    writers.module("llama").build(tp=2).generate(IDS, max_new_tokens=5, stream=stop)


def test_what_a_stream_raises_is_raised_on_every_rank():
    with pytest.raises(RankError) as error:
        run_ranks(2, _failing_stream)
    assert str(error.value).count("the stream callback has failed with KeyError('stop')") == 2
