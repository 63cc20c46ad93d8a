"""Messages between the stages of a pipeline: activations to the next one, gradients to the previous one.

Both sides know the shape of every message, since all stages hold the same micro-batches: nothing is asked.
"""

from collections import deque

import torch
import torch.distributed as dist

from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.pipeline_order import Transfer

_TAGS = {("activation", True): 0, ("activation", False): 1, ("gradient", True): 2, ("gradient", False): 3}
"""By tensor, and whether the sender is the lower stage."""


class StageMessages:
    """Owns the messages of one schedule that are on their way.

    A send returns at once; the one before it on the same channel has to have been received. Messages of
    different channels do not wait for each other: gloo tells them apart by tags, and NCCL, which runs those
    of one group and pair of ranks in the order of the calls, by groups.
    """

    def __init__(self, topology: Topology) -> None:
        """Begin without messages."""
        self._topology = topology
        self._open_sends: dict[tuple[int, int], deque[tuple[dist.Work, torch.Tensor]]] = {}

    def send(self, action: Transfer, tensor: torch.Tensor) -> None:
        """Send a tensor, which must not change before the next send of its channel, or `finish`."""
        peer, group, tag = self._route(action)
        earlier = self._open_sends.setdefault((peer, tag), deque())
        while earlier:
            earlier.popleft()[0].wait()
        tensor = tensor.detach().contiguous()
        earlier.append((dist.isend(tensor, peer, group=group, tag=tag), tensor))

    def receive(self, action: Transfer, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of another stage."""
        peer, group, tag = self._route(action)
        tensor = torch.empty(shape, dtype=dtype, device=self._topology.device)
        dist.irecv(tensor, peer, group=group, tag=tag).wait()
        return tensor

    def finish(self) -> None:
        """Wait until all that was sent has been received."""
        for earlier in self._open_sends.values():
            while earlier:
                earlier.popleft()[0].wait()

    def _route(self, action: Transfer) -> tuple[int, dist.ProcessGroup, int]:
        """Return the peer's rank in the world, the group of the channel, and its tag."""
        topology = self._topology
        sender, receiver = topology.pp_rank, action.peer
        if action.kind == "receive":
            sender, receiver = receiver, sender
        tag = _TAGS[action.tensor, sender < receiver]
        group = topology.pp_channels[tag]
        peer = dist.get_global_rank(topology.pp_group, action.peer)
        return peer, group, tag if topology.device.type == "cpu" else 0
