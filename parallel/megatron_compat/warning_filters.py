"""Warnings that Megatron-core raises from within itself, silenced: nobody who uses it can act on them.

That Transformer Engine and apex are absent is reported once, by name, by `glm-rlhf doctor`.
"""

import warnings

MESSAGES = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`torch.distributed._all_gather_base` is a private function",
    "`torch.distributed._reduce_scatter_base` is a private function",
)
"""What the silenced warnings begin with, whoever raises them."""
_DEPRECATED_MODULES = r"megatron\.core\.inference"


def install() -> None:
    """Silence them in this process; before Megatron-core is imported, since some are raised by its import."""
    for message in MESSAGES:
        warnings.filterwarnings("ignore", message=message.replace(".", r"\."))
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=_DEPRECATED_MODULES)
