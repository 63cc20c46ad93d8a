"""A limit on the size of files, at which the kernel refuses a write as a full disk or a quota does."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes for a while; then `write` raises EFBIG."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
