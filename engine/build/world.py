"""The ranks of a command, in the layout that its config asks for."""

from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

from glm_rlhf.engine.build.models import layout_of
from glm_rlhf.engine.config.sections import ParallelSection, RunSection
from glm_rlhf.engine.config.training import TrainingRunSection
from glm_rlhf.engine.runs.same_start import check_same_start
from glm_rlhf.parallel.runtime.topology import Topology, open_topology


class RunsOnRanks(Protocol):
    """A root config of a command on several ranks."""

    @property
    def parallel(self) -> ParallelSection:
        """The layout."""

    @property
    def run(self) -> RunSection | TrainingRunSection:
        """Names the seed."""


def open_world(config: RunsOnRanks) -> AbstractContextManager[Topology]:
    """Return, as a context manager, the topology of a command; every rank of the launch enters.

    Before anything else the ranks compare what they were started with, see `check_same_start`.

    Raises:
        ValueError: as `open_topology`; or the ranks were started with other settings, models, data or code.
    """
    axes = config.parallel
    return open_topology(
        layout_of(axes),
        timeout_s=axes.timeout_s,
        seed=config.run.seed,
        check=partial(check_same_start, config),
    )
