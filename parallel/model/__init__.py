"""The sharded GLM: layers, attention over packed sequences, heads, vocabulary-parallel logprob and loss.

Imports `spec`, `megatron_compat`, `runtime`, `storage`, and `kernels`.
"""
