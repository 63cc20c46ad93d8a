"""The policy in the layout that it generates in, where that is not the one it trains in."""

import contextlib
from collections.abc import Iterator, Sequence

from glm_rlhf.parallel.inference.resharded_weights import ReshardedWeights
from glm_rlhf.parallel.inference.weight_views import ChunkWeights
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.generation_topology import generation_topology
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.layout import Layout


@contextlib.contextmanager
def generation_layout(
    chunks: Sequence[GLMModel], topology: Topology, *, tp: int | None, pp: int | None, timeout_s: float
) -> Iterator[ReshardedWeights | None]:
    """Return, as a context manager, the policy's parameters in another layout; None where it is the same one.

    Every rank of the world enters. Groups and plan are made once; memory is held, and weights move, only
    while `weights_for_generation` lasts.

    Args:
        chunks: this rank's chunks of the policy, bare.
        topology: their layout and groups.
        tp, pp: tensor and pipeline parallelism while generating; None for that of `topology`.
        timeout_s: seconds after which a collective that some rank never entered fails.

    Raises:
        ValueError: the layout divides the world or the model into no whole parts.
    """
    mine = topology.layout
    layout = Layout(tp=mine.tp if tp is None else tp, pp=mine.pp if pp is None else pp)
    if (layout.tp, layout.pp) == (mine.tp, mine.pp):
        yield None
        return
    layout.check_model(chunks[0].glm)
    with generation_topology(layout, topology, timeout_s=timeout_s) as target:
        yield ReshardedWeights(chunks, target)


@contextlib.contextmanager
def weights_for_generation(
    chunks: Sequence[GLMModel], topology: Topology, resharded: ReshardedWeights | None
) -> Iterator[tuple[Sequence[GLMModel | ChunkWeights], Topology]]:
    """Return, as a context manager, the policy to generate with, and its layout and groups.

    Args:
        chunks: this rank's chunks of the policy, bare; used as they are where there is no second layout.
        topology: their layout and groups.
        resharded: of `generation_layout`; the world communicates, all its ranks enter.
    """
    if resharded is None:
        yield chunks, topology
    else:
        with resharded.filled() as weights:
            yield weights, resharded.topology
