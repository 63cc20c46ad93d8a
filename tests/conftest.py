"""Settings of the whole suite: the Triton interpreter stands in for a GPU where there is none."""

import os
from collections.abc import Iterator
from pathlib import Path

# Several ranks share few cores; and torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from rank_pool import RankPool

if not torch.cuda.is_available():
    # Read by Triton when a kernel is decorated, hence before the first import of glm_rlhf.kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unasked = [marker for marker in ("soak", "slow") if marker not in config.option.markexpr]
    items[:] = [item for item in items if not any(map(item.get_closest_marker, unasked))]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four gloo ranks; `ranks.run(function, *args)` returns one result a rank."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real inputs beside the checkout; tests that use it skip where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip(
            f"no real inputs: {SHARED_DATA.parent.name}/{SHARED_DATA.name} is not beside the checkout"
        )
    return SHARED_DATA
