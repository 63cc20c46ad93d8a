"""Sharded GLM models on Megatron-core: the only floor that imports it."""

import warnings

from glm_rlhf.parallel.megatron_compat import lazy_compile

# What Megatron-core warns of from within itself, in every process, whoever uses it. That Transformer
# Engine and apex are absent is said once, by name, by `glm-rlhf doctor`.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`torch.distributed._all_gather_base` is a private function",
    "`torch.distributed._reduce_scatter_base` is a private function",
):
    warnings.filterwarnings("ignore", message=_message.replace(".", r"\."))
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"megatron\.core\.inference")
del _message
lazy_compile.install()
