"""Sharded GLM models on Megatron-core: the only floor that imports it."""

import warnings

# Each of Megatron-core's modules warns of its own when it is imported; `glm-rlhf doctor` says it once.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"megatron\.core\.inference")
