"""The store behind the world's process group, and how far a group has come: torch has no public names."""

import torch.distributed as dist


def world_store() -> dist.Store:
    """Return the store over which the ranks of the world found each other, or the one that a caller gave."""
    return dist.distributed_c10d._get_default_store()


def num_collectives(group: dist.ProcessGroup) -> int:
    """Return how many collectives this rank has begun in a group: the same on all ranks at the same one."""
    return group._get_sequence_number_for_group()
