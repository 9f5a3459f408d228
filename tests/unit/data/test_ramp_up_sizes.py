"""The sizes of growing batches are megatron-core's, and each sample is read once."""

import pytest
from megatron.core import num_microbatches_calculator
from torch.utils.data import DistributedSampler

from lightning_megatron.data import BatchSizeSteps, RampUp, RampUpBatches

Calculator = getattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator", None)


@pytest.mark.skipif(Calculator is None, reason="megatron-core 0.18 and newer have no ramp-up any more")
@pytest.mark.parametrize(("start", "increment", "samples", "full"), [(2, 2, 40, 8), (4, 4, 100, 24)])
def test_sizes_are_megatrons(start, increment, samples, full):
    rule = RampUp(start, increment, samples)
    theirs = Calculator(full, 1, 1, False, 0, start, increment, samples)
    for consumed in range(3 * samples):
        theirs.update(consumed, consistency_check=True, verbose=False)
        assert rule.size(consumed, full) == theirs.current_running_global_batch_size


def test_sizes_of_each_part_of_training():
    rule = BatchSizeSteps({0: 2, 10: 4, 18: 8})
    assert [rule.size(consumed, 8) for consumed in (0, 9, 10, 17, 18, 99)] == [2, 2, 4, 4, 8, 8]
    assert rule.consumed(7, 8) == 5 * 2 + 2 * 4
    sampler = DistributedSampler(range(50), 2, 1, shuffle=False)
    assert [len(batch) for batch in RampUpBatches(sampler, 4, rule)] == [1] * 5 + [2] * 2 + [4] * 4
    for sizes, full, replicas, says in (
        ({5: 2}, 2, 1, "a size of 1 or more from 0 samples on"),
        ({0: 2, 5: 4}, 8, 1, "ends at 4, and the global batch is 8"),
        ({0: 2, 5: 4}, 4, 4, "2 does not divide by the 4 data-parallel ranks"),
    ):
        with pytest.raises(ValueError, match=says):
            BatchSizeSteps(sizes).check(full, replicas)


@pytest.mark.parametrize("replicas", [1, 2])
def test_each_sample_once_in_the_same_global_batches(replicas):
    def global_batches(count):
        samplers = [DistributedSampler(range(50), count, rank, shuffle=False) for rank in range(count)]
        each = [list(RampUpBatches(sampler, 8 // count, RampUp(2, 2, 20))) for sampler in samplers]
        assert {len(batches) for batches in each} == {len(RampUpBatches(samplers[0], 8 // count, RampUp(2, 2, 20)))}
        return [sorted(sum(parts, [])) for parts in zip(*each, strict=True)]

    seen = global_batches(replicas)
    assert [len(batch) for batch in seen[:6]] == [2, 2, 2, 2, 4, 4]
    assert sorted(sum(seen, [])) == list(range(len(sum(seen, []))))
    assert seen == global_batches(1)
