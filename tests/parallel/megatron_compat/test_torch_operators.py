"""The operators do what their names here say."""

import pytest
import torch

from glm_rlhf.parallel.megatron_compat.torch_operators import copy_all, occupy_device


def test_every_target_becomes_its_source_across_dtypes():
    sources = [torch.arange(6.0).reshape(2, 3), torch.full((), 0.5)]
    targets = [torch.empty(2, 3, dtype=torch.bfloat16), torch.zeros(())]
    copy_all(targets, sources)
    assert all(torch.equal(target.float(), source) for target, source in zip(targets, sources, strict=True))


@pytest.mark.gpu
def test_the_device_is_busy_and_the_host_is_not():
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    occupy_device(2_000_000_000)  # a second at 2 GHz
    end.record()
    assert not end.query()
    end.synchronize()
    assert start.elapsed_time(end) > 100
