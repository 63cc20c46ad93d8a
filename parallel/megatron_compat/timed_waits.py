"""A context around every wait of torch.distributed: it has no hook for them, so `Work.wait` is replaced.

Every synchronous collective, object collective and barrier ends in that method, and every send and receive
of the pipeline.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed import Work


@contextlib.contextmanager
def around_waits(make_context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Have each wait of this process run in a context of its own while the block runs.

    Args:
        make_context: called once per wait, in the thread that waits.
    """
    original = Work.wait

    def wait(work: Work, *args: Any, **options: Any) -> Any:
        with make_context():
            return original(work, *args, **options)

    Work.wait = wait
    try:
        yield
    finally:
        Work.wait = original
