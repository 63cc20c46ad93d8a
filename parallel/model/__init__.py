"""The sharded GLM: layers, packed attention, heads, vocabulary-parallel log-probability and loss.

Imports `spec`, `megatron_compat`, `runtime`, `storage`, and `kernels`.
"""
