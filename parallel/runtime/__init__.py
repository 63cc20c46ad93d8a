"""Process groups, errors and signals that all ranks share, timed spans, tensors offloaded to host memory.

Imports `spec` and `megatron_compat`.
"""
