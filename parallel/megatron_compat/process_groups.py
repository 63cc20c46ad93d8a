"""The process groups that Megatron-core has created, of which it keeps a private list."""

import torch.distributed as dist
from megatron.core import parallel_state


def created_groups() -> list[dist.ProcessGroup]:
    """Return every group that this rank is in and Megatron-core created, each once; not the world.

    Megatron-core forgets its groups (`destroy_model_parallel`, which empties the list) and never destroys
    them: their connections and threads would stay until the process ends.
    """
    listed = parallel_state._global_process_group_list or []
    # None in the list stands for the world.
    groups = {id(group): group for group in listed if group is not None and group is not dist.group.WORLD}
    return list(groups.values())
