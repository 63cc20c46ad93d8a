"""The policy in a generation layout that differs from the training layout."""

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
    """Return, as a context manager, the policy's weights in the generation layout; None if it is the same.

    Every rank of the world enters. Groups and the reshard plan are made once; memory is allocated, and
    weights are sent, only inside `weights_for_generation`.

    Args:
        chunks: this rank's chunks of the policy, unwrapped.
        topology: their layout and groups.
        tp, pp: tensor- and pipeline-parallel size of generation; None: that of `topology`.
        timeout_s: seconds after which a collective fails that some rank has not entered.

    Raises:
        ValueError: the layout does not divide the world or the model evenly.
    """
    training = topology.layout
    layout = Layout(tp=training.tp if tp is None else tp, pp=training.pp if pp is None else pp)
    if (layout.tp, layout.pp) == (training.tp, training.pp):
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
        chunks: this rank's chunks of the policy, unwrapped; used in place without a generation layout.
        topology: their layout and groups.
        resharded: from `generation_layout`; if it is not None, the world communicates and all ranks enter.
    """
    if resharded is None:
        yield chunks, topology
    else:
        with resharded.filled() as weights:
            yield weights, resharded.topology
